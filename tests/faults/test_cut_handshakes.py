"""A peer that goes away at every step of the handshake: counted once, nothing left open, nobody else disturbed."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from gateway.tls.openssl import TlsVersion
from tests.faults.conftest import Stage
from tests.support.bad_hellos import record
from tests.support.capabilities import missing
from tests.support.devices import TLS12, TLS13, TlsDevice, reset
from tests.support.gateway import wait_for

TCP_REPAIR = 19

Step = Callable[[TlsDevice], None]


def nothing(_: TlsDevice) -> None:
    """Only connected."""


def half_a_hello(device: TlsDevice) -> None:
    flight = device.flight()
    device.sock.sendall(flight[: len(flight) // 2])


def hello(device: TlsDevice) -> None:
    """The hello is sent, the answer is not read: a reset then finds unread bytes."""
    device.transmit()


def server_flight(device: TlsDevice) -> None:
    """The server has spoken and waits for the proof."""
    device.transmit()
    device.take()


def half_a_proof(device: TlsDevice) -> None:
    server_flight(device)
    flight = device.flight()
    device.sock.sendall(flight[: len(flight) // 2])


def proof(device: TlsDevice) -> None:
    """All is said, and the server's last words may be on their way."""
    server_flight(device)
    device.transmit()


def established(device: TlsDevice) -> None:
    """Both sides know that it worked."""
    device.handshake()
    device.send(b"line\n")
    assert device.receive_line() == "ok 1"


BEFORE_THE_PROOF: list[Step] = [nothing, half_a_hello, hello, server_flight, half_a_proof]
versions = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])


@pytest.fixture(params=["reset", "fin"])
def leave(request: pytest.FixtureRequest) -> Callable[[TlsDevice], None]:
    """How the peer goes."""
    if request.param == "reset":
        return lambda device: reset(device.sock)
    return lambda device: device.sock.close()


@versions
@pytest.mark.parametrize("step", BEFORE_THE_PROOF)
def test_a_peer_that_leaves_before_its_proof(
    stage: Stage, version: TlsVersion, step: Step, leave: Callable[[TlsDevice], None]
) -> None:
    with stage.counts("peer_closed"), TlsDevice(stage.port, stage.device, version=version) as device:
        step(device)
        leave(device)
    assert stage.last_failure()["outcome"] == "peer_closed"


@versions
def test_a_peer_that_leaves_with_its_proof(
    stage: Stage, version: TlsVersion, leave: Callable[[TlsDevice], None]
) -> None:
    """Whether the gateway saw the proof before the reset is not known; it is counted once in any case."""
    before = stage.handshakes()
    with TlsDevice(stage.port, stage.device, version=version) as device:
        proof(device)
        leave(device)
    wait_for(lambda: stage.gateway.metric("pskgw_connections") == 1, what="the connection gone")
    assert stage.handshakes() - before in ({"ok": 1}, {"peer_closed": 1})


@versions
def test_a_peer_that_leaves_its_session(
    stage: Stage, version: TlsVersion, leave: Callable[[TlsDevice], None]
) -> None:
    with stage.counts("ok"), TlsDevice(stage.port, stage.device, version=version) as device:
        established(device)
        leave(device)


@versions
@pytest.mark.parametrize("step", [half_a_hello, server_flight, half_a_proof])
def test_a_peer_that_ends_its_direction_before_its_proof(
    stage: Stage, version: TlsVersion, step: Step
) -> None:
    """It may still listen, but it can say nothing more: that is the end of the handshake."""
    with stage.counts("peer_closed"), TlsDevice(stage.port, stage.device, version=version) as device:
        step(device)
        device.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while device.sock.recv(65536):
                pass


@versions
def test_a_peer_that_ends_with_an_alert(stage: Stage, version: TlsVersion) -> None:
    """As one does that does not like the server's choice; in 1.3 a plain alert is still allowed there."""
    with stage.counts("peer_closed"), TlsDevice(stage.port, stage.device, version=version) as device:
        server_flight(device)
        device.sock.sendall(record(b"\x02\x28", 0x0303, kind=21))
        with contextlib.suppress(ConnectionError):
            while device.sock.recv(65536):
                pass
    assert "alert" in stage.last_failure()["reason"]


@versions
@pytest.mark.parametrize("step", [nothing, half_a_hello, server_flight])
def test_a_peer_that_loses_its_power_runs_into_the_deadline(
    stage: Stage, version: TlsVersion, step: Step
) -> None:
    with stage.counts("timeout"), TlsDevice(stage.port, stage.device, version=version) as device:
        step(device)
        with powerless(device.sock):
            wait_for(lambda: stage.gateway.metric("pskgw_connections") == 1, what="the connection gone")


@contextlib.contextmanager
def powerless(sock: socket.socket) -> Iterator[None]:
    """The peer neither sends nor answers anything any more: half-open, as after a loss of power."""
    if os.geteuid() != 0:
        missing("a connection can be frozen by root only")
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    except OSError as exc:
        missing(f"this kernel cannot freeze a connection: {exc}")
    yield
    sock.close()  # in this mode nothing is sent, not even the end
