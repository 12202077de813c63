"""What a peer's TCP has acknowledged, asked of real sockets."""

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from gateway.server.connections.ending import acknowledged_bytes
from tests.support.servers import wait_until

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A device with a small window, and the gateway's socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as device:
        device.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        device.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            accepted.setblocking(False)
            yield device, accepted


def test_nothing_is_acknowledged_before_anything_is_sent(pair: Pair) -> None:
    assert acknowledged_bytes(pair[1]) == 0


def test_all_of_it_to_the_byte(pair: Pair) -> None:
    device, accepted = pair
    for total in (1, 1000, 1001):
        accepted.send(bytes(total - acknowledged_bytes(accepted)))
        device.recv(4096)
        wait_until(lambda total=total: acknowledged_bytes(accepted) == total, 5, f"{total} acknowledged")


def test_what_a_device_does_not_read_is_not_acknowledged(pair: Pair) -> None:
    _, accepted = pair
    sent = accepted.send(bytes(1_000_000))
    time.sleep(0.1)  # nothing more can be waited for
    assert 0 < acknowledged_bytes(accepted) < sent


def test_what_is_in_flight_when_a_device_resets_is_not_acknowledged(pair: Pair) -> None:
    device, accepted = pair
    sent = accepted.send(bytes(1_000_000))
    device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    device.close()
    closed = 7  # TCP_CLOSE
    wait_until(
        lambda: accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == closed, 5, "the reset"
    )
    assert acknowledged_bytes(accepted) < sent


def test_a_closed_socket_cannot_tell(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        acknowledged_bytes(pair[1])
