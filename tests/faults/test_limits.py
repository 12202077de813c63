"""The bounds of [limits]: what is over one is refused, counted and logged, and what is within goes on."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import pytest

from gateway.registry.store import NewDevice
from tests.faults.conftest import TICK_S
from tests.support.devices import TLS12, End, Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.services import Service, echo, pours

CONNECTIONS, PER_ADDRESS, IN_FLIGHT = 8, 4, 2
FIRST_MESSAGE_S, IDLE_S = 1.0, 2.0
LATE_S = TICK_S + 1
POURED = 64 << 20


@dataclasses.dataclass
class Stage:
    """A gateway with tight limits."""

    gateway: Gateway
    lines: Device
    stream: Device
    pour: Device
    port: int

    def rate_limited(self) -> int:
        return int(self.gateway.metric_by("outcome", "pskgw_handshakes_total")["rate_limited"])


@pytest.fixture(scope="module")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Service(echo) as echoing, Service(pours(POURED)) as pouring:
        gateway = new_gateway(
            tmp_path_factory.mktemp("limits") / "gateway",
            limits=f"""
                connections = {CONNECTIONS}
                connections_per_address = {PER_ADDRESS}
                handshakes_in_flight = {IN_FLIGHT}
                first_message_timeout_s = {FIRST_MESSAGE_S}
                idle_timeout_s = {IDLE_S}
            """,
            routes='[[routes]]\nname = "lines"\nmatch = { group = "lines" }\nframing = "lines"\n'
            'content_type = "text/plain"\nbackend = "events"\n'
            '[[routes]]\nname = "pour"\nmatch = { group = "pour" }\nframing = "stream"\nbackend = "pour"\n'
            '[[routes]]\nname = "stream"\nframing = "stream"\nbackend = "echo"\n',
            backends=f'[backends.echo]\nkind = "tcp"\nurl = "{echoing.url}"\n'
            f'[backends.pour]\nkind = "tcp"\nurl = "{pouring.url}"\n',
        )
        lines, stream, pour = gateway.add_devices(
            NewDevice(identity="lines", group="lines"),
            NewDevice(identity="stream"),
            NewDevice(identity="pour", group="pour"),
        )
        with running(gateway):
            yield Stage(gateway, lines, stream, pour, gateway.port())
            assert gateway.stop() == 0
            assert gateway.complaints() == []


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """The gateway of the module; after each test everything is free again."""
    yield shared_stage
    wait_for(lambda: shared_stage.gateway.metric("pskgw_connections") == 0, what="all connections gone")


def test_connections_per_address(stage: Stage) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(PER_ADDRESS):
            held.enter_context(TlsDevice.connect(stage.port, stage.lines, address="127.0.0.2"))
        before = stage.rate_limited()
        for _ in range(3):
            with pytest.raises((Refused, ConnectionError)):
                TlsDevice.connect(stage.port, stage.lines, address="127.0.0.2")
        assert stage.rate_limited() - before == 3
        with TlsDevice.connect(stage.port, stage.lines, address="127.0.0.3") as other:
            other.send(b"served\n")
            assert other.receive_line() == "ok 1"
    refused = stage.gateway.wait_for_event("connection_refused", address="127.0.0.2")
    assert refused["reason"] == "connection limit"


def test_connections(stage: Stage) -> None:
    with contextlib.ExitStack() as held:
        devices = [
            held.enter_context(TlsDevice.connect(stage.port, stage.stream, address=f"127.0.0.{2 + n % 4}"))
            for n in range(CONNECTIONS)
        ]
        before = stage.rate_limited()
        with pytest.raises((Refused, ConnectionError)):
            TlsDevice.connect(stage.port, stage.stream, address="127.0.0.9")
        assert stage.rate_limited() - before == 1
        for device in devices:
            device.echo(b"go on")
        devices[0].reset()
        wait_for(lambda: stage.gateway.metric("pskgw_connections") == CONNECTIONS - 1, what="a free place")
        with TlsDevice.connect(stage.port, stage.stream, address="127.0.0.9") as device:
            device.echo(b"let in")


def test_silent_connections_are_no_handshakes_in_flight(stage: Stage) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(PER_ADDRESS - 1):
            silent = held.enter_context(TlsDevice(stage.port, stage.stream))
            silent.sock.sendall(silent.flight()[:10])
        with TlsDevice.connect(stage.port, stage.stream) as device:
            device.echo(b"let in")


def test_handshakes_in_flight(stage: Stage) -> None:
    with contextlib.ExitStack() as held:
        waiting = [
            held.enter_context(TlsDevice(stage.port, stage.stream, version=TLS12)) for _ in range(IN_FLIGHT)
        ]
        for device in waiting:
            device.transmit()
            device.take()
        before = stage.rate_limited()
        with pytest.raises(Refused) as refused:
            TlsDevice.connect(stage.port, stage.stream)
        assert refused.value.alert is None
        assert stage.rate_limited() - before == 1
        failure = stage.gateway.wait_for_event("handshake_failed", outcome="rate_limited")
        assert "handshakes_in_flight" in failure["reason"]
        waiting[0].handshake()  # those that are in go on, and their end makes room
        waiting[0].echo(b"finished")
        with TlsDevice.connect(stage.port, stage.stream) as device:
            device.echo(b"let in")
        waiting[1].reset()


def test_a_framed_session_without_a_first_message_ends_in_time(stage: Stage) -> None:
    with TlsDevice.connect(stage.port, stage.lines) as device:
        began = time.monotonic()
        assert device.receive_to_end() == b""
        assert FIRST_MESSAGE_S - 0.1 <= time.monotonic() - began < FIRST_MESSAGE_S + LATE_S
        assert device.end is End.NOTIFIED
    stage.gateway.wait_for_event("session_timed_out", device="lines")


def test_a_stream_session_may_be_silent_for_longer_than_that(stage: Stage) -> None:
    with TlsDevice.connect(stage.port, stage.stream) as device:
        began = time.monotonic()
        assert device.receive_to_end() == b""
        assert IDLE_S - 0.1 <= time.monotonic() - began < IDLE_S + LATE_S
        assert device.end is End.NOTIFIED


def test_traffic_in_either_direction_puts_the_idle_deadline_off(stage: Stage) -> None:
    with TlsDevice.connect(stage.port, stage.lines) as device:
        began = time.monotonic()
        number = 0
        while time.monotonic() - began < IDLE_S + 1:
            number += 1
            device.send(b"alive\n")
            assert device.receive_line() == f"ok {number}"
            time.sleep(FIRST_MESSAGE_S + 0.2)  # each time longer than the first message may take
        last = time.monotonic() - FIRST_MESSAGE_S - 0.2
        assert device.receive_to_end() == b""
        assert IDLE_S - 0.1 <= time.monotonic() - last < IDLE_S + LATE_S
        assert device.end is End.NOTIFIED


def test_a_session_that_timed_out_waits_for_a_slow_device_to_read_its_end(stage: Stage) -> None:
    with TlsDevice.connect(stage.port, stage.pour, receive_buffer_bytes=4096) as device:
        stage.gateway.wait_for_event("session_timed_out", device="pour", timeout_s=2 * IDLE_S)
        time.sleep(4 * TICK_S)
        received = device.receive_to_end()
        assert device.end is End.NOTIFIED
    assert 0 < len(received) < POURED
