"""The way back: commands to connected devices, and to those that connect later, wherever that is."""

import base64
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.device import RawDevice, add_devices
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

ROUTES = (
    "".join(
        f'[[routes]]\nname = "{framing}"\nmatch = {{ group = "{framing}" }}\nframing = "{framing}"\nbackend = "events"\n'
        for framing in ("lines", "length16", "length32")
    )
    + '[[routes]]\nname = "bytes"\nmatch = { group = "bytes" }\nframing = "stream"\nbackend = "service"\n'
)
BACKENDS = '[backends.service]\nkind = "tcp"\nurl = "tcp://127.0.0.1:9"\nconnect_timeout_s = 30\n'


@pytest.fixture(params=[False, True], ids=["uvloop", "asyncio"], scope="module")
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("commands")
    gateway = new_gateway(
        directory / "gateway",
        routes=ROUTES,
        backends=BACKENDS,
        node="workers = 2",
        asyncio_only=request.param,
    )
    with running(gateway):
        yield gateway


_numbers = iter(range(10_000))


def new_device(gateway: Gateway, group: str = "lines") -> Device:
    (device,) = add_devices(gateway, {f"{group}-{next(_numbers)}": group}).values()
    time.sleep(0.7)  # registry to replica: half a second of poll interval
    return device


class Online:
    """A connected device whose network a thread keeps alive, as a kernel would."""

    def __init__(self, gateway: Gateway, device: Device) -> None:
        self.raw = RawDevice(gateway.port(), device)
        wait_for(
            lambda: any(each["device"] == device.identity for each in gateway.sessions()), what="the session"
        )


@pytest.mark.parametrize("framing", ["lines", "length16", "length32"])
def test_a_command_is_delivered(gateway: Gateway, framing: str) -> None:
    device = new_device(gateway, framing)
    raw = Online(gateway, device).raw
    with raw:
        shown = json.loads(gateway.ctl("send-command", "--json", device.identity, "open valve").stdout)
        assert shown["state"] == "delivered"
        content = f"command {shown['command']} open valve".encode()
        prefix = {"lines": 0, "length16": 2, "length32": 4}[framing]
        expected = len(content).to_bytes(prefix, "big") + content if prefix else content + b"\n"
        assert raw.receive_exactly(len(expected)) == expected
        raw.send(len(b"21.5").to_bytes(prefix, "big") + b"21.5" if prefix else b"21.5\n")
        answer = b"\n" if not prefix else b""
        assert raw.receive_exactly(prefix + 4 + len(answer)).endswith(b"ok 1" + answer)


def test_payloads_from_stdin_and_from_a_file(gateway: Gateway, tmp_path: Path) -> None:
    device = new_device(gateway, "length32")
    binary = bytes(range(256)) * 300
    (tmp_path / "firmware").write_bytes(binary)
    with Online(gateway, device).raw as raw:
        done = gateway.ctl("send-command", device.identity, input="from stdin\n")
        assert done.stdout == f"Delivered to {device.identity}.\n"
        assert raw.receive_until(b"from stdin\n")
        gateway.ctl("send-command", device.identity, "--file", tmp_path / "firmware")
        assert raw.receive_until(binary)


class TestNotDelivered:
    def test_not_connected(self, gateway: Gateway) -> None:
        done = gateway.ctl("send-command", "nobody", "x", check=False)
        assert done.returncode == 1
        assert done.stderr == (
            "error: device nobody of realm default is not connected: `--queue` keeps the command until it is\n"
        )
        assert gateway.metric("pskgw_commands_total", outcome="not_connected") >= 1

    def test_a_line_break_on_lines(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        with Online(gateway, device).raw:
            done = gateway.ctl("send-command", device.identity, "a\nb", check=False)
        assert done.returncode == 1
        assert "a line break does not fit on a route with framing = lines" in done.stderr

    def test_too_long_for_the_prefix(self, gateway: Gateway, tmp_path: Path) -> None:
        device = new_device(gateway, "length16")
        (tmp_path / "large").write_bytes(bytes(65_536))
        with Online(gateway, device).raw:
            done = gateway.ctl("send-command", device.identity, "--file", tmp_path / "large", check=False)
        assert done.returncode == 1
        assert "65535 do" in done.stderr

    def test_a_stream_has_no_commands(self, gateway: Gateway) -> None:
        device = new_device(gateway, "bytes")
        with Online(gateway, device).raw:
            done = gateway.ctl("send-command", device.identity, "x", check=False)
        assert done.returncode == 1
        assert "a route that carries bytes" in done.stderr

    def test_a_device_that_is_reset_before_it_has_read_it_all(self, gateway: Gateway, tmp_path: Path) -> None:
        """Its kernel's window is small and it does not read: what is in our kernel is not delivered."""
        device = new_device(gateway, "length32")
        (tmp_path / "large").write_bytes(bytes(8 << 20))
        raw = RawDevice(gateway.port(), device, receive_buffer=4096)
        wait_for(
            lambda: any(each["device"] == device.identity for each in gateway.sessions()), what="the session"
        )

        def abort_on_the_way() -> None:
            raw.wait_for_bytes(1024)
            raw.abort()

        reset = threading.Thread(target=abort_on_the_way)
        reset.start()
        done = gateway.ctl("send-command", device.identity, "--file", tmp_path / "large", check=False)
        reset.join()
        assert done.returncode == 1
        assert "the connection broke before it was acknowledged" in done.stderr

    def test_a_device_that_does_not_acknowledge_in_time(self, gateway: Gateway, tmp_path: Path) -> None:
        device = new_device(gateway, "length32")
        (tmp_path / "large").write_bytes(bytes(8 << 20))
        raw = RawDevice(gateway.port(), device, receive_buffer=4096)
        wait_for(
            lambda: any(each["device"] == device.identity for each in gateway.sessions()), what="the session"
        )
        done = gateway.ctl(
            "send-command", device.identity, "--timeout", "0.5", "--file", tmp_path / "large", check=False
        )
        assert (done.returncode, "has not acknowledged it yet" in done.stderr) == (1, True)
        again = gateway.ctl("send-command", device.identity, "x", check=False)
        assert "does not read what is sent to it" in again.stderr
        raw.abort()


def test_of_two_sessions_the_newest_gets_it(gateway: Gateway) -> None:
    device = new_device(gateway)
    with RawDevice(gateway.port(), device) as old:
        time.sleep(0.05)
        with RawDevice(gateway.port(), device) as new:
            wait_for(
                lambda: sum(s["device"] == device.identity for s in gateway.sessions()) == 2, what="sessions"
            )
            gateway.ctl("send-command", device.identity, "hello")
            assert new.receive_line().endswith(b" hello")
            assert not old.is_closed()
            assert not old._received


class TestQueued:
    def test_until_the_device_connects(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        ids = []
        for text in ("first", "second", "third"):
            shown = json.loads(gateway.ctl("send-command", device.identity, text, "--queue", "--json").stdout)
            assert shown["state"] == "queued"
            ids.append(shown["command"])
        time.sleep(0.7)
        with RawDevice(gateway.port(), device) as raw:
            for command_id, text in zip(ids, ("first", "second", "third"), strict=True):
                assert raw.receive_line() == f"command {command_id} {text}".encode()
        self.wait_until_nothing_waits(gateway)
        with RawDevice(gateway.port(), device) as raw:  # not once more
            raw.send(b"x\n")
            assert raw.receive_line() == b"ok 1"

    def test_a_device_that_reconnects_at_once_does_not_get_it_again(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        gateway.ctl("send-command", device.identity, "once", "--queue")
        time.sleep(0.7)
        with RawDevice(gateway.port(), device) as raw:
            assert raw.receive_line().endswith(b" once")
            time.sleep(0.1)
        for _ in range(6):  # both workers, before the registry knows
            with RawDevice(gateway.port(), device) as raw:
                raw.send(b"x\n")
                assert raw.receive_line() == b"ok 1"
        self.wait_until_nothing_waits(gateway)

    def test_a_connected_device_gets_it_within_a_second(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        with Online(gateway, device).raw as raw:
            gateway.ctl("send-command", device.identity, "now", "--queue")
            started = time.monotonic()
            assert raw.receive_line().endswith(b" now")
            assert time.monotonic() - started < 1.5
        self.wait_until_nothing_waits(gateway)

    def test_not_after_its_time(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        gateway.ctl("send-command", device.identity, "late", "--queue", "--ttl", "1s")
        time.sleep(1.2)
        with RawDevice(gateway.port(), device) as raw:
            raw.send(b"x\n")
            assert raw.receive_line() == b"ok 1"

    def test_one_that_does_not_fit_lets_the_others_pass(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        gateway.ctl("send-command", device.identity, "--queue", "--ttl", "20s", input="two\nlines")
        gateway.ctl("send-command", device.identity, "fits", "--queue")
        time.sleep(0.7)
        with RawDevice(gateway.port(), device) as raw:
            assert raw.receive_line().endswith(b" fits")
        gateway.wait_for_event("command_unfit", device=device.identity)

    def test_listed_and_cancelled(self, gateway: Gateway) -> None:
        device = new_device(gateway)

        def queue(text: str) -> str:
            shown = gateway.ctl("send-command", device.identity, text, "--queue", "--json", "--ttl", "1h")
            return str(json.loads(shown.stdout)["command"])

        def listed(*args: str) -> list[dict[str, str]]:
            found = json.loads(gateway.ctl("list-commands", "--json", *args).stdout)
            assert isinstance(found, list)
            return found

        first, second = queue("first"), queue("second")
        found = listed("--device", device.identity, "--realm", "default")
        assert [each["command"] for each in found] == [first, second]
        assert base64.b64decode(found[0]["payload_base64"]) == b"first"
        assert found[0]["created_at"] < found[0]["expires_at"]
        assert {first, second} <= {each["command"] for each in listed()}
        assert first in gateway.ctl("list-commands", "--device", device.identity).stdout
        assert gateway.ctl("cancel-command", first).stdout == f"Cancelled {first}.\n"
        assert [each["command"] for each in listed("--device", device.identity)] == [second]
        again = gateway.ctl("cancel-command", first, check=False)
        assert (again.returncode, "see `gatewayctl list-commands`" in again.stderr) == (1, True)
        time.sleep(0.7)
        with RawDevice(gateway.port(), device) as raw:
            assert raw.receive_line() == f"command {second} second".encode()
        wait_for(lambda: listed("--device", device.identity) == [], what="nothing more that waits")

    def test_listed_of_an_unknown_realm(self, gateway: Gateway) -> None:
        done = gateway.ctl("list-commands", "--realm", "nowhere", check=False)
        assert (done.returncode, done.stderr.startswith("error: ")) == (1, True)

    def test_an_unknown_device(self, gateway: Gateway) -> None:
        done = gateway.ctl("send-command", "nobody", "x", "--queue", check=False)
        assert (done.returncode, "does not exist" in done.stderr) == (1, True)

    @pytest.mark.parametrize("ttl", ["", "7", "-1d", "0s", "1y", "400d"])
    def test_what_is_no_time(self, gateway: Gateway, ttl: str) -> None:
        assert gateway.ctl("send-command", "x", "y", "--queue", f"--ttl={ttl}", check=False).returncode == 2

    def test_a_removed_device_takes_its_commands_along(self, gateway: Gateway) -> None:
        device = new_device(gateway)
        gateway.ctl("send-command", device.identity, "x", "--queue")
        gateway.ctl("remove-device", device.identity)
        with sqlite3.connect(gateway.directory / "registry.db") as database:
            assert database.execute("SELECT count(*) FROM commands WHERE payload = X'78'").fetchone() == (0,)

    @staticmethod
    def wait_until_nothing_waits(gateway: Gateway) -> None:
        """Of what can still be delivered; what does not fit or was late goes when it expires."""

        def waiting() -> int:
            with sqlite3.connect(gateway.directory / "registry.db") as database:
                (count,) = database.execute(
                    "SELECT count(*) FROM commands WHERE payload NOT LIKE '%two%' AND payload NOT LIKE 'late'"
                ).fetchone()
                return int(count)

        wait_for(lambda: waiting() == 0, what="an empty table of commands")


def test_a_command_queued_while_no_gateway_runs_is_delivered_by_another_node(tmp_path: Path) -> None:
    """Two nodes with one registry: the command goes to the one that the device connects to."""
    first = new_gateway(tmp_path / "first", routes=ROUTES, backends=BACKENDS)
    device = first.add_device("roaming", "--group", "lines")
    first.ctl("send-command", "roaming", "where are you", "--queue")
    second_config = first.config.read_text().replace('data_dir = "data"', 'data_dir = "data2"')
    second = Gateway(tmp_path / "first")
    second.config = tmp_path / "first" / "second.toml"
    second.config.write_text(second_config)
    second.log_path = tmp_path / "first" / "second.jsonl"
    with running(first), running(second):
        with RawDevice(second.port(), device) as raw:
            assert raw.receive_line().endswith(b" where are you")
            time.sleep(0.2)
        time.sleep(1.5)  # through the registry to the other node's replica
        with RawDevice(first.port(), device) as raw:
            raw.send(b"x\n")
            assert raw.receive_line() == b"ok 1"


def test_a_delivered_command_is_not_forgotten_with_its_follower(tmp_path: Path) -> None:
    """The registry is away when it is delivered, and a reload puts another follower in the place of the one that knows."""
    gateway = new_gateway(tmp_path / "gateway", routes=ROUTES, backends=BACKENDS)
    aside = tmp_path / "aside"
    with running(gateway):
        device = new_device(gateway)
        gateway.ctl("send-command", device.identity, "once", "--queue")
        gateway.wait_until_followed()
        aside.mkdir()
        for file in gateway.directory.glob("registry.db*"):
            file.rename(aside / file.name)
        gateway.wait_for_event("registry_unusable", state="away")
        with RawDevice(gateway.port(), device) as raw:
            assert raw.receive_line().endswith(b" once")
            before = gateway.follower_pid()
            gateway.config.write_text(gateway.config.read_text().replace('level = "debug"', 'level = "info"'))
            assert gateway.process is not None
            os.kill(gateway.process.pid, signal.SIGHUP)
            gateway.wait_for_event("reloaded")
        assert gateway.follower_pid() != before
        for file in aside.iterdir():
            file.rename(gateway.directory / file.name)
        wait_for(
            lambda: json.loads(gateway.ctl("list-commands", "--json").stdout) == [],
            30,  # the new follower may just have begun to wait for a registry that is away
            "it waits no longer",
        )
