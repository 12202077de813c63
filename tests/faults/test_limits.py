"""The bounds of [limits]: what is over one is refused, counted and logged, and what is within goes on."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import pytest

from gateway.registry.store import NewDevice
from gateway.server.admission.limits import BURST_S
from tests.faults.conftest import TICK_S
from tests.support.devices import TLS12, End, Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.services import Service, echo, pours

CONNECTIONS, PER_ADDRESS, PER_NETWORK, IN_FLIGHT = 8, 4, 6, 2
RATE_PER_S, HANDSHAKE_S = 3, 2.0
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
                connections_per_network = {PER_NETWORK}
                connections_per_address_per_s = {RATE_PER_S}
                refused_networks = ["127.0.66.0/24"]
                exempt_networks = ["127.0.1.9/32"]
                handshake_timeout_s = {HANDSHAKE_S}
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
    assert refused["reason"] == "limits.connections_per_address"


def test_connections(stage: Stage) -> None:
    with contextlib.ExitStack() as held:
        devices = [
            held.enter_context(TlsDevice.connect(stage.port, stage.stream, address=f"127.0.{4 + n % 4}.1"))
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
        with TlsDevice.connect(stage.port, stage.stream) as device:
            device.echo(b"let in")
        assert stage.rate_limited() - before == 1
        failure = stage.gateway.wait_for_event("handshake_failed", outcome="rate_limited")
        assert "handshakes_in_flight" in failure["reason"]
        with pytest.raises(Refused) as refused:
            waiting[0].handshake()  # the oldest of them made room
        assert refused.value.alert is None
        waiting[1].handshake()
        waiting[1].echo(b"finished")


def test_connections_per_network(stage: Stage) -> None:
    with contextlib.ExitStack() as held:
        for number in range(PER_NETWORK):
            address = f"127.0.1.{1 + number // 2}"
            held.enter_context(TlsDevice.connect(stage.port, stage.stream, address=address))
        with pytest.raises((Refused, ConnectionError)):
            TlsDevice.connect(stage.port, stage.stream, address="127.0.1.250")
        with TlsDevice.connect(stage.port, stage.stream, address="127.0.2.1") as device:
            device.echo(b"let in")
        with TlsDevice.connect(stage.port, stage.stream, address="127.0.1.9") as exempt:
            exempt.echo(b"not bound by it")
    refused = stage.gateway.wait_for_event("connection_refused", address="127.0.1.250")
    assert refused["reason"] == "limits.connections_per_network"


def test_new_connections_a_second(stage: Stage) -> None:
    """The burst is ten seconds' worth."""
    burst = round(RATE_PER_S * BURST_S)
    _connect_each_time(stage, "127.0.3.1", burst)
    with pytest.raises((Refused, ConnectionError)):
        _connect_each_time(stage, "127.0.3.1", burst)
    refused = stage.gateway.wait_for_event("connection_refused", address="127.0.3.1")
    assert refused["reason"] == "limits.connections_per_address_per_s"
    TlsDevice.connect(stage.port, stage.stream, address="127.0.3.2").close()


def _connect_each_time(stage: Stage, address: str, times: int) -> None:
    for _ in range(times):
        TlsDevice.connect(stage.port, stage.stream, address=address).reset()
        wait_for(lambda: stage.gateway.metric("pskgw_connections") == 0, what="the connection gone")


def test_refused_networks(stage: Stage) -> None:
    with pytest.raises((Refused, ConnectionError)):
        TlsDevice.connect(stage.port, stage.stream, address="127.0.66.6")
    refused = stage.gateway.wait_for_event("connection_refused", address="127.0.66.6")
    assert refused["reason"] == "limits.refused_networks"
    assert stage.gateway.metric("pskgw_handshakes_total", outcome="address_refused") == 1


def test_no_byte_extends_the_time_of_the_handshake(stage: Stage) -> None:
    """One byte each tenth of the time, of a hello that would be right."""
    with TlsDevice(stage.port, stage.stream) as device:
        began = time.monotonic()
        hello = device.flight()
        with pytest.raises(ConnectionError):
            _trickle(device, hello, HANDSHAKE_S / 10)
        assert HANDSHAKE_S - 0.1 <= time.monotonic() - began < HANDSHAKE_S + LATE_S


def _trickle(device: TlsDevice, data: bytes, every_s: float) -> None:
    for index in range(len(data)):
        device.sock.sendall(data[index : index + 1])
        time.sleep(every_s)


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
