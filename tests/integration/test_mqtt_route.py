"""Devices that speak MQTT, through a gateway, to a real broker: who they are is what their key has proved."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.wire.mqtt_connect import CONNECT_BYTES_MAX
from tests.support.device import RawDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.mosquitto import Mosquitto, free_port, mosquitto, program

PASSWORD = "between gateway and broker"
ROUTE = '[[routes]]\nname = "broker"\nframing = "mqtt"\nmqtt_password_file = "mqtt.password"\nbackend = "broker"\n'
CONNECT = bytes.fromhex("10 0d 0004 4d515454 04 02 003c 0001 63")
CONNECT_V5 = bytes.fromhex("10 0e 0004 4d515454 05 02 003c 00 0001 63")


def broker_settings(directory: Path, *users: str) -> str:
    passwords = directory / "passwords"
    passwords.touch()
    for user in users:
        subprocess.run(
            [program("mosquitto_passwd"), "-b", passwords, user, PASSWORD], check=True, capture_output=True
        )
    (directory / "acl").write_text("pattern readwrite devices/%u/#\n")
    return f"allow_anonymous false\npassword_file {passwords}\nacl_file {directory}/acl"


@pytest.fixture(params=[False, True], ids=["uvloop", "asyncio"], scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Site"]:
    directory = tmp_path_factory.mktemp("mqtt")
    with mosquitto(directory, broker_settings(directory, "meter-a", "meter-b", "plant/7", "any#")) as broker:
        gateway = new_gateway(
            directory / "gateway",
            routes=ROUTE,
            backends=f'[backends.broker]\nkind = "tcp"\nurl = "tcp://127.0.0.1:{broker.port}"\nconnect_timeout_s = 1\n',
            limits="first_message_timeout_s = 1.5",
            asyncio_only=request.param,
        )
        (gateway.directory / "mqtt.password").write_text(PASSWORD + "\n")
        with running(gateway):
            yield Site(gateway, broker)


class Site:
    def __init__(self, gateway: Gateway, broker: Mosquitto) -> None:
        self.gateway = gateway
        self.broker = broker
        self._subscriptions: dict[str, int] = {}
        self.devices = {name: gateway.add_device(name) for name in ("meter-a", "meter-b", "plant/7", "any#")}
        time.sleep(0.6)  # registry to replica: half a second of poll interval

    def client(self, tool: str, device: str, *args: str) -> list[str]:
        """A command line of Mosquitto's clients, connecting to the gateway by PSK."""
        found = self.devices[device]
        return [
            program(tool), "-h", "127.0.0.1", "-p", str(self.gateway.port()),
            "--psk-identity", found.identity, "--psk", found.key, *self._client_id(tool, args), *args,
        ]  # fmt: skip

    @staticmethod
    def _client_id(tool: str, args: tuple[str, ...]) -> list[str]:
        """Two connections without a client id are one MQTT client: the second takes over the first."""
        return [] if "-i" in args else ["-i", tool[-3:]]

    def publish(self, device: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.client("mosquitto_pub", device, *args),
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
        )

    def wait_for_subscription(self, device: str) -> None:
        """Until the broker has taken one more `mosquitto_sub` of this device."""
        self._subscriptions[device] = seen = self._subscriptions.get(device, 0) + 1
        mark = f"SUBACK to default/{device}/sub"
        wait_for(lambda: self.broker.log().count(mark) >= seen, what="the subscription")

    def raw(self, device: str) -> RawDevice:
        return RawDevice(self.gateway.port(), self.devices[device])


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_a_device_publishes_and_subscribes_under_its_own_name(site: Site, version: str) -> None:
    with subprocess.Popen(
        site.client(
            "mosquitto_sub", "meter-a", "-V", version, "-t", "devices/meter-a/#", "-C", "1", "-W", "10", "-v"
        ),
        stdout=subprocess.PIPE,
        text=True,
    ) as subscriber:
        site.wait_for_subscription("meter-a")
        done = site.publish("meter-a", "-V", version, "-q", "1", "-t", "devices/meter-a/up", "-m", "21.5")
        assert done.returncode == 0, done.stderr
        output, _ = subscriber.communicate(timeout=15)
    assert output == "devices/meter-a/up 21.5\n"


def test_another_devices_topics_are_out_of_reach(site: Site) -> None:
    with subprocess.Popen(
        site.client(
            "mosquitto_sub",
            "meter-b",
            "-t",
            "devices/#",
            "-t",
            "devices/meter-b/#",
            "-C",
            "1",
            "-W",
            "10",
            "-v",
        ),
        stdout=subprocess.PIPE,
        text=True,
    ) as subscriber:
        site.wait_for_subscription("meter-b")
        for device in ("meter-a", "meter-b"):
            done = site.publish(device, "-q", "1", "-t", "devices/meter-b/up", "-m", f"from {device}")
            assert done.returncode == 0, done.stderr  # 3.1.1 has no word for a message that is not allowed
        output, _ = subscriber.communicate(timeout=15)
    assert output == "devices/meter-b/up from meter-b\n"
    refused = site.publish("meter-a", "-V", "mqttv5", "-q", "1", "-t", "devices/meter-b/up", "-m", "x")
    assert "not authorized" in (refused.stdout + refused.stderr).lower()


def test_a_device_cannot_be_another_whatever_it_says(site: Site) -> None:
    before = len(site.broker.log())
    done = site.publish(
        "meter-a",
        "-u",
        "meter-b",
        "-P",
        PASSWORD,
        "-i",
        "default/meter-b",
        "-q",
        "1",
        "-t",
        "devices/meter-a/up",
        "-m",
        "x",
    )
    assert done.returncode == 0, done.stderr
    wait_for(lambda: "CONNACK" in site.broker.log()[before:], what="the connection")
    log = site.broker.log()[before:]
    assert "as default/meter-a/default%2Fmeter-b" in log
    assert "u'meter-a'" in log
    assert "u'meter-b'" not in log


def test_the_key_of_one_with_the_identity_of_the_other(site: Site) -> None:
    site.devices["impostor"] = Device("meter-b", site.devices["meter-a"].key)
    done = site.publish("impostor", "-t", "devices/meter-b/up", "-m", "x")
    assert done.returncode != 0


def test_names_are_percent_encoded_in_client_ids(site: Site) -> None:
    before = len(site.broker.log())
    assert (
        site.publish("plant/7", "-i", "app 1", "-q", "1", "-t", "devices/plant/7/up", "-m", "x").returncode
        == 0
    )
    assert "default/plant%2F7/app%201" in site.broker.log()[before:]


def test_a_client_id_stays_the_same_and_the_session_with_it(site: Site) -> None:
    """A persistent session of a device without a client id of its own: what came in its absence is there afterwards."""
    with site.raw("meter-a") as device:
        device.send(bytes.fromhex("10 0c 0004 4d515454 04 00 003c 0000"))  # clean session 0, no client id
        assert device.receive_exactly(4)[:2] == b"\x20\x02"
        device.send(
            b"\x82\x16\x00\x01\x00\x11devices/meter-a/#\x01"[:2] + b"\x00\x01\x00\x11devices/meter-a/#\x01"
        )
        assert device.receive_exactly(5) == b"\x90\x03\x00\x01\x01"
        device.send(b"\xe0\x00")
    assert site.publish("meter-a", "-q", "1", "-t", "devices/meter-a/later", "-m", "kept").returncode == 0
    with site.raw("meter-a") as device:
        device.send(bytes.fromhex("10 0c 0004 4d515454 04 00 003c 0000"))
        assert device.receive_exactly(4) == b"\x20\x02\x01\x00"  # session present
        assert b"kept" in device.receive_until(b"kept")
        device.send(bytes.fromhex("e000"))


def test_a_will_is_left_as_it_is(site: Site) -> None:
    with subprocess.Popen(
        site.client("mosquitto_sub", "meter-a", "-t", "devices/meter-a/gone", "-C", "1", "-W", "10"),
        stdout=subprocess.PIPE,
        text=True,
    ) as subscriber:
        site.wait_for_subscription("meter-a")
        will = b"\x00\x14devices/meter-a/gone\x00\x04dead"
        body = b"\x00\x04MQTT\x04\x06\x00\x3c\x00\x01w" + will
        device = site.raw("meter-a")
        device.send(b"\x10" + bytes([len(body)]) + body)
        assert device.receive_exactly(4) == b"\x20\x02\x00\x00"
        device.abort()
        output, _ = subscriber.communicate(timeout=15)
    assert output == "dead\n"


class TestBadInput:
    def refused(self, site: Site, reason: str) -> float:
        return site.gateway.metric("pskgw_messages_rejected_total", route="broker", reason=reason)

    @pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b"\x30\x05\x00\x01ab\x00"])
    def test_garbage_is_closed_without_a_word(self, site: Site, garbage: bytes) -> None:
        before = self.refused(site, "invalid")
        with site.raw("meter-a") as device:
            device.send(garbage)
            assert device.receive() == b""
        assert self.refused(site, "invalid") == before + 1

    @pytest.mark.parametrize(("connect", "connack"), [(CONNECT, "20020002"), (CONNECT_V5, "2003009500")])
    def test_a_client_id_of_64_kilobytes(self, site: Site, connect: bytes, connack: str) -> None:
        before = self.refused(site, "too_long")
        body = connect[2:-3] + b"\xff\xff" + b"i" * 0xFFFF
        length = bytes([len(body) & 0x7F | 0x80, len(body) >> 7 & 0x7F | 0x80, len(body) >> 14])
        with site.raw("meter-a") as device:
            device.send(b"\x10" + length + body)
            assert device.receive().hex() == connack
            assert device.receive() == b""
        assert self.refused(site, "too_long") == before + 1
        assert len(body) > CONNECT_BYTES_MAX

    def test_a_connect_in_single_bytes(self, site: Site) -> None:
        with site.raw("meter-a") as device:
            for byte in CONNECT:
                device.send(bytes([byte]))
            assert device.receive_exactly(4) == b"\x20\x02\x00\x00"

    def test_what_follows_at_once_is_not_lost(self, site: Site) -> None:
        with site.raw("meter-a") as device:
            device.send(CONNECT + b"\xc0\x00")
            assert device.receive_exactly(6) == b"\x20\x02\x00\x00\xd0\x00"

    def test_a_connect_that_trickles_meets_its_deadline(self, site: Site) -> None:
        before = self.refused(site, "invalid")
        started = time.monotonic()
        with site.raw("meter-a") as device:
            for byte in CONNECT:
                if device.is_closed():
                    break
                device.send(bytes([byte]))
                time.sleep(0.2)
            else:
                pytest.fail("the CONNECT was taken")
        assert 1.4 < time.monotonic() - started < 4
        wait_for(lambda: self.refused(site, "invalid") == before + 1, what="the count")

    def test_an_opened_session_is_no_longer_under_that_deadline(self, site: Site) -> None:
        with site.raw("meter-a") as device:
            device.send(CONNECT)
            assert device.receive_exactly(4) == b"\x20\x02\x00\x00"
            time.sleep(2.5)
            device.send(b"\xc0\x00")
            assert device.receive_exactly(2) == b"\xd0\x00"

    @pytest.mark.parametrize(("connect", "connack"), [(CONNECT, "20020005"), (CONNECT_V5, "2003008700")])
    def test_a_name_that_is_a_wildcard(self, site: Site, connect: bytes, connack: str) -> None:
        before = self.refused(site, "refused")
        with site.raw("any#") as device:
            device.send(connect)
            assert device.receive().hex() == connack
        assert self.refused(site, "refused") == before + 1

    def test_31_is_told_its_version(self, site: Site) -> None:
        with site.raw("meter-a") as device:
            device.send(bytes.fromhex("10 0f 0006 4d5149736470 03 02 003c 0001 63"))
            assert device.receive().hex() == "20020001"

    def test_a_second_connect_is_for_the_broker_to_refuse(self, site: Site) -> None:
        with site.raw("meter-a") as device:
            device.send(CONNECT)
            assert device.receive_exactly(4) == b"\x20\x02\x00\x00"
            device.send(bytes.fromhex("10 16 0004 4d515454 04 82 003c 0001 63 0007 6d657465722d62"))
            assert device.receive() == b""


def test_a_broker_that_is_away(site: Site, tmp_path: Path) -> None:
    nobody = free_port()
    gateway = new_gateway(
        tmp_path / "gateway",
        routes=ROUTE.replace('mqtt_password_file = "mqtt.password"', 'mqtt_password = "x"'),
        backends=f'[backends.broker]\nkind = "tcp"\nurl = "tcp://127.0.0.1:{nobody}"\nconnect_timeout_s = 0.5\n',
    )
    device = gateway.add_device("meter-a")
    with running(gateway):
        for connect, connack in ((CONNECT, "20020003"), (CONNECT_V5, "2003008800")):
            with RawDevice(gateway.port(), device) as raw:
                raw.send(connect)
                assert raw.receive().hex() == connack
        assert gateway.metric("pskgw_messages_rejected_total", reason="unavailable") == 2
    del site
