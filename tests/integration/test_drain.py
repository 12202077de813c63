"""SIGTERM: everything received is answered, every device gets close_notify, and the gateway is gone in time."""

import contextlib
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.devices import End, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.services import Service, echo

DRAIN_S = 3
UNDER_WAY = 40
"""Lines that a device sends ahead of their answers."""
LINES = (
    '[[routes]]\nname = "lines"\nmatch = { group = "lines" }\nframing = "lines"\n'
    'content_type = "text/plain"\nbackend = "events"\n'
)


@pytest.fixture(params=["uvloop", "asyncio"])
def asyncio_only(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "asyncio")


@contextlib.contextmanager
def stoppable(
    directory: Path,
    *,
    asyncio_only: bool,
    workers: int = 1,
    routes: str = LINES,
    backends: str = "",
    drain_s: float = DRAIN_S,
) -> Iterator[tuple[Gateway, Device]]:
    """A running gateway, which the test stops, and a device of the group `lines`."""
    gateway = new_gateway(
        directory / "gateway",
        node=f"workers = {workers}",
        routes=routes,
        backends=backends,
        asyncio_only=asyncio_only,
    )
    gateway.config.write_text(gateway.config.read_text().replace("drain_s = 3", f"drain_s = {drain_s}"))
    (device,) = gateway.add_devices(NewDevice(identity="d", group="lines"))
    with running(gateway):
        yield gateway, device
        assert gateway.complaints() == []


class Talker:
    """A device that sends lines as fast as they are answered, with some always under way, until the gateway ends."""

    def __init__(self, port: int, device: Device) -> None:
        self.answers: list[str] = []
        self.end: End | None = None
        self._device = TlsDevice.connect(port, device)
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _talk(self) -> None:
        with self._device as device:
            device.send(b"line\n" * UNDER_WAY)
            while answer := device.receive_line():
                self.answers.append(answer)
                with contextlib.suppress(ConnectionError):
                    device.send(b"line\n")
            self.end = device.end


def test_devices_that_talk_get_every_answer_and_close_notify(tmp_path: Path, asyncio_only: bool) -> None:
    with stoppable(tmp_path, asyncio_only=asyncio_only, workers=2) as (gateway, device):
        port = gateway.port()
        talkers = [Talker(port, device) for _ in range(16)]
        wait_for(lambda: all(len(talker.answers) > 100 for talker in talkers), what="all talk")
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < DRAIN_S + 1
        for talker in talkers:
            talker.join()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
    acknowledged = []
    for talker in talkers:
        assert talker.end is End.NOTIFIED
        for number, answer in enumerate(talker.answers, 1):
            assert answer in (f"ok {number}", f"error {number} stopping")
        acknowledged.append(sorted(n for n, a in enumerate(talker.answers, 1) if a == f"ok {n}"))
    by_session: dict[str, list[int]] = {}
    for event in gateway.output_events():
        by_session.setdefault(event["id"][:36], []).append(int(event["sequence"]))
    assert sorted(by_session.values()) == sorted(acknowledged), "what arrived is what was acknowledged"


def test_a_backend_that_takes_its_time_is_waited_for(tmp_path: Path, asyncio_only: bool) -> None:
    with stoppable(tmp_path, asyncio_only=asyncio_only) as (gateway, registered):
        with TlsDevice.connect(gateway.port(), registered) as device, _locked_events(gateway) as release:
            device.send(b"line\n" * 10)
            wait_for(lambda: gateway.metric("pskgw_messages_received_total") == 10, what="all received")
            stopping = _stop_in_background(gateway)
            gateway.wait_for_event("session_stopped")
            time.sleep(DRAIN_S / 2)  # so long does the backend take
            assert gateway.output_events() == []
            release()
            assert device.receive_lines(11) == [*(f"ok {n}" for n in range(1, 11)), ""]
            assert device.end is End.NOTIFIED
        assert stopping() == 0
    assert len(gateway.output_events()) == 10


def test_a_backend_that_is_stuck_does_not_keep_the_gateway(tmp_path: Path) -> None:
    with stoppable(tmp_path, asyncio_only=False, drain_s=0.5) as (gateway, registered):
        with TlsDevice.connect(gateway.port(), registered) as device, _locked_events(gateway):
            device.send(b"line\n")
            wait_for(lambda: gateway.metric("pskgw_messages_received_total") == 1, what="received")
            began = time.monotonic()
            assert gateway.stop() == 0
            assert time.monotonic() - began < 0.5 + 6.5  # the window, and 5 s until its worker is killed
            assert device.receive_to_end() == b""
            assert device.end is End.NOTIFIED
        gateway.wait_for_event("child_killed", child="worker-0")
        gateway.log_path.write_text("")  # this one gateway had a reason to complain


def test_idle_devices_and_handshakes_do_not_delay_the_end(tmp_path: Path, asyncio_only: bool) -> None:
    stream = '[[routes]]\nname = "stream"\nframing = "stream"\nbackend = "echo"\n'
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service(echo))
        gateway, registered = stack.enter_context(
            stoppable(
                tmp_path,
                asyncio_only=asyncio_only,
                routes=LINES + stream,
                backends=f'[backends.echo]\nkind = "tcp"\nurl = "{service.url}"\n',
            )
        )
        (streamer,) = gateway.add_devices(NewDevice(identity="streamer"))
        gateway.wait_until_followed()
        port = gateway.port()
        connected = [
            stack.enter_context(TlsDevice.connect(port, each)) for each in (registered, registered, streamer)
        ]
        connected[-1].echo(b"hello")
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        half_way = stack.enter_context(TlsDevice(port, registered))
        half_way.sock.sendall(half_way.flight()[:100])
        wait_for(lambda: gateway.metric("pskgw_connections") == 5, what="all are connected")
        began = time.monotonic()
        stopping = _stop_in_background(gateway, signal.SIGINT)
        for device in connected:
            assert device.receive_to_end() == b""
            assert device.end is End.NOTIFIED
            device.close()
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        assert stopping() == 0
        assert time.monotonic() - began < 1.5
        assert service.peer.done.wait(10)
    failed = gateway.events("handshake_failed")  # by us, and not by peers that went away
    assert [(each["outcome"], each["reason"]) for each in failed] == [
        ("timeout", "no handshake in time: the gateway stops")
    ] * 2


def test_workers_that_are_being_started_again_do_not_delay_the_end(tmp_path: Path) -> None:
    with stoppable(tmp_path, asyncio_only=False, workers=2) as (gateway, _):
        for number in range(2):
            os.kill(gateway.wait_for_event("child_started", child=f"worker-{number}")["pid"], signal.SIGKILL)
        gateway.wait_for_event("child_ended")
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < DRAIN_S
        gateway.log_path.write_text("")  # this one gateway had a reason to complain


@contextlib.contextmanager
def _locked_events(gateway: Gateway) -> Iterator[Callable[[], None]]:
    """Hold the lock that the file backend needs for every batch, until the function that is given is called."""
    path = gateway.directory / "events.jsonl"
    path.touch()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def _stop_in_background(gateway: Gateway, number: int = signal.SIGTERM) -> Callable[[], int]:
    """Send the signal now; the function that is given waits for the exit status."""
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(gateway.stop(number)))
    thread.start()

    def result() -> int:
        thread.join(20)
        return statuses[0]

    return result
