"""Commands that come from real brokers: one subscription per node, framed to whichever worker has the device."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nats
import pytest

from tests.support.device import RawDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.servers import PASSWORD, USER, Certificates, MosquittoServer, NatsServer, Server, program

ROUTE = '[[routes]]\nname = "r"\nframing = "length16"\nbackend = "events"\n'
Publish = Callable[[str, str, bytes, str | None], None]


def publish_mqtt(port: int) -> Publish:
    def publish(realm: str, device: str, payload: bytes, command_id: str | None) -> None:
        named = ["-D", "publish", "user-property", "id", command_id] if command_id else []
        subprocess.run(
            [
                program("mosquitto_pub"), "-V", "mqttv5", "-h", "127.0.0.1", "-p", str(port), "-u", USER, "-P", PASSWORD,
                "-q", "1", "-t", f"devices/{realm}/{device}/down", "-s", *named,
            ],
            input=payload, check=True, timeout=10,
        )  # fmt: skip

    return publish


def publish_nats(port: int) -> Publish:
    async def send(realm: str, device: str, payload: bytes, command_id: str | None) -> None:
        client = await nats.connect(f"nats://127.0.0.1:{port}", user=USER, password=PASSWORD)
        headers = {"Nats-Msg-Id": command_id} if command_id else None
        await client.publish(f"devices.{realm}.{device}.down", payload, headers=headers)
        await client.drain()

    return lambda *args: asyncio.run(send(*args))


class Site:
    def __init__(
        self, gateway: Gateway, broker: Server, publish: Publish, devices: dict[str, Device]
    ) -> None:
        self.gateway = gateway
        self.broker = broker
        self.publish = publish
        self.devices = devices


@pytest.fixture(params=["mqtt", "nats"], scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(request.param)
    certificates = Certificates(folder / "certificates")
    kind = request.param
    broker: Server = (MosquittoServer if kind == "mqtt" else NatsServer)(folder / "broker", certificates)
    with broker:
        where = 'topic = "up/{device}"' if kind == "mqtt" else 'subject = "up.{device}"'
        gateway = new_gateway(
            folder / "gateway",
            routes=ROUTE,
            node="workers = 2",
            backends=f'[backends.b]\nkind = "{kind}"\nurl = "{kind}://127.0.0.1:{broker.port}"\n'
            f'username = "{USER}"\npassword = "{PASSWORD}"\n'
            f"{where}\ncommands = true\n",
        )
        devices = {name: gateway.add_device(name) for name in ("valve-1", "plant/7.a b")}
        with running(gateway):
            gateway.wait_for_event("commands_subscribed", backend="b")
            yield Site(
                gateway, broker, (publish_mqtt if kind == "mqtt" else publish_nats)(broker.port), devices
            )


def receive(raw: RawDevice) -> bytes:
    return raw.receive_exactly(int.from_bytes(raw.receive_exactly(2), "big"))


def test_a_command_reaches_the_device_on_either_worker(site: Site) -> None:
    for number in range(4):
        with RawDevice(site.gateway.port(), site.devices["valve-1"]) as raw:
            wait_for(site.gateway.sessions, what="the session")
            site.publish("default", "valve-1", b"open\n\x00now", f"cmd-{number}")
            assert receive(raw) == f"command cmd-{number} ".encode() + b"open\n\x00now"
        wait_for(lambda: not site.gateway.sessions(), what="the end")
    assert len(site.gateway.events("commands_subscribed")) == 1, "one subscription per node"
    wait_for(lambda: site.gateway.metric("pskgw_commands_total", outcome="delivered") >= 4, what="the count")


def test_one_without_an_id_gets_one(site: Site) -> None:
    with RawDevice(site.gateway.port(), site.devices["valve-1"]) as raw:
        wait_for(site.gateway.sessions, what="the session")
        site.publish("default", "valve-1", b"shut", None)
        word, command_id, payload = receive(raw).split(b" ")
        assert (word, len(command_id), payload) == (b"command", 36, b"shut")


def test_names_are_percent_encoded(site: Site) -> None:
    with RawDevice(site.gateway.port(), site.devices["plant/7.a b"]) as raw:
        wait_for(site.gateway.sessions, what="the session")
        site.publish("default", "plant%2F7%2Ea%20b", b"hello", "x")
        assert receive(raw) == b"command x hello"


def test_a_device_that_is_not_here_is_counted(site: Site) -> None:
    before = site.gateway.metric("pskgw_commands_total", outcome="not_connected")
    site.publish("default", "nobody", b"x", None)
    wait_for(
        lambda: site.gateway.metric("pskgw_commands_total", outcome="not_connected") == before + 1,
        what="the count",
    )


def test_one_that_does_not_fit_is_counted(site: Site) -> None:
    with RawDevice(site.gateway.port(), site.devices["valve-1"]) as raw:
        wait_for(site.gateway.sessions, what="the session")
        site.publish("default", "valve-1", bytes(65_530), None)
        wait_for(
            lambda: site.gateway.metric("pskgw_commands_total", outcome="refused") >= 1, what="the count"
        )
        assert not raw.is_closed()


def test_a_broker_that_goes_and_comes_back(site: Site) -> None:
    site.broker.stop()
    site.gateway.wait_for_event("commands_away", backend="b")
    site.broker.start()
    wait_for(
        lambda: len(site.gateway.events("commands_subscribed")) >= 2, timeout_s=20, what="the subscription"
    )
    with RawDevice(site.gateway.port(), site.devices["valve-1"]) as raw:
        wait_for(site.gateway.sessions, what="the session")
        site.publish("default", "valve-1", b"again", "y")
        assert receive(raw) == b"command y again"


def test_wrong_password(tmp_path: Path) -> None:
    with MosquittoServer(tmp_path / "broker", Certificates(tmp_path / "certificates")) as broker:
        gateway = new_gateway(
            tmp_path / "gateway",
            routes=ROUTE,
            backends=f'[backends.b]\nkind = "mqtt"\nurl = "mqtt://{USER}:wrong@127.0.0.1:{broker.port}"\n'
            'topic = "up"\ncommands = true\n',
        )
        with running(gateway):
            reason = str(gateway.wait_for_event("commands_away", backend="b")["reason"])
            assert "wrong" not in reason
            assert "uthor" in reason
