"""Counts of connections and handshakes."""

from gateway.server.limits import ConnectionLimits
from gateway.server.settings import LimitsSettings


def limits(workers: int = 1, **settings: int) -> ConnectionLimits:
    return ConnectionLimits(LimitsSettings.model_validate(settings), workers)


def test_connections_of_one_address() -> None:
    counted = limits(connections=10, connections_per_address=2)
    assert counted.admit("192.0.2.1")
    assert counted.admit("192.0.2.1")
    assert not counted.admit("192.0.2.1")
    assert counted.admit("192.0.2.2")
    counted.release("192.0.2.1")
    assert counted.admit("192.0.2.1")


def test_connections_of_all_addresses() -> None:
    counted = limits(connections=2, connections_per_address=2)
    assert counted.admit("192.0.2.1")
    assert counted.admit("192.0.2.2")
    assert not counted.admit("192.0.2.3")


def test_addresses_that_left_are_forgotten() -> None:
    counted = limits()
    for number in range(1000):
        assert counted.admit(f"2001:db8::{number:x}")
        counted.release(f"2001:db8::{number:x}")
    assert counted._by_address == {}


def test_handshakes() -> None:
    counted = limits(handshakes_in_flight=1)
    assert counted.begin_handshake()
    assert not counted.begin_handshake()
    counted.end_handshake()
    assert counted.begin_handshake()


def test_a_worker_has_its_share_rounded_up() -> None:
    counted = limits(workers=2, connections=3, connections_per_address=3)
    assert counted.admit("192.0.2.1")
    assert counted.admit("192.0.2.1")
    assert not counted.admit("192.0.2.1")
