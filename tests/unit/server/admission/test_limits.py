"""Counts of connections and handshakes."""

import random
from typing import Any

import pytest

from gateway.server.admission.limits import BURST_S, ConnectionLimits, share
from gateway.server.admission.limits_settings import LimitsSettings


def limits(workers: int = 1, files_max: int | None = None, **settings: Any) -> ConnectionLimits[str]:
    return ConnectionLimits(LimitsSettings.model_validate(settings), workers, files_max)


def test_connections_of_one_address() -> None:
    counted = limits(connections=10, connections_per_address=2)
    assert counted.admit("192.0.2.1", 0) == ""
    assert counted.admit("192.0.2.1", 0) == ""
    assert counted.admit("192.0.2.1", 0) == "connections_per_address"
    assert counted.admit("192.0.2.2", 0) == ""
    counted.release("192.0.2.1")
    assert counted.admit("192.0.2.1", 0) == ""


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (["192.0.2.1", "192.0.2.200"], "192.0.3.1"),
        (["2001:db8::1", "2001:db8::ffff:0:0:1"], "2001:db8:0:1::1"),
        (["::ffff:192.0.2.1", "192.0.2.2"], "::ffff:192.0.3.1"),
    ],
)
def test_connections_of_one_network(inside: list[str], outside: str) -> None:
    counted = limits(connections_per_network=2)
    for address in inside:
        assert counted.admit(address, 0) == ""
    assert counted.admit(inside[1], 0) == "connections_per_network"
    assert counted.admit(outside, 0) == ""
    counted.release(inside[0])
    assert counted.admit(inside[1], 0) == ""


def test_connections_of_all_addresses() -> None:
    counted = limits(connections=2)
    assert counted.admit("192.0.2.1", 0) == ""
    assert counted.admit("198.51.100.1", 0) == ""
    assert counted.admit("203.0.113.1", 0) == "connections"
    assert not counted.admit_balancer()
    counted.release("192.0.2.1")
    assert counted.admit_balancer()
    assert counted.admit("203.0.113.1", 0) == "connections"
    counted.release_balancer()
    assert counted.admit("203.0.113.1", 0) == ""


def test_descriptors_bound_connections() -> None:
    counted = limits(connections=10, files_max=1)
    assert counted.admit("192.0.2.1", 0) == ""
    assert counted.admit("192.0.2.2", 0) == "connections"


@pytest.mark.parametrize("per", ["address", "network"])
def test_new_connections_a_second(per: str) -> None:
    counted = limits(**{f"connections_per_{per}_per_s": 2})
    burst = round(2 * BURST_S)
    refusal = f"connections_per_{per}_per_s"
    for _ in range(burst):
        assert counted.admit("192.0.2.1", 100) == ""
        counted.release("192.0.2.1")
    assert counted.admit("192.0.2.1", 100) == refusal
    assert counted.admit("192.0.3.1", 100) == ""
    assert counted.admit("192.0.2.2", 100) == (refusal if per == "network" else "")
    assert counted.admit("192.0.2.1", 100.5) == ""
    assert counted.admit("192.0.2.1", 100.5) == refusal


def test_refused_and_exempt_networks() -> None:
    counted = limits(
        connections=4,
        connections_per_address=1,
        connections_per_network=1,
        connections_per_address_per_s=0.1,
        refused_networks=["198.51.100.0/24", "2001:db8::/32"],
        exempt_networks=["192.0.2.0/28"],
    )
    assert counted.admit("198.51.100.7", 0) == "refused_networks"
    assert counted.admit("::ffff:198.51.100.7", 0) == "refused_networks"
    assert counted.admit("2001:db8::7", 0) == "refused_networks"
    for _ in range(4):
        assert counted.admit("192.0.2.1", 0) == ""
    assert counted.admit("192.0.2.1", 0) == "connections"


def test_addresses_that_left_are_forgotten() -> None:
    counted = limits()
    for number in range(1000):
        assert counted.admit(f"2001:db8:{number:x}::1", 0) == ""
        counted.release(f"2001:db8:{number:x}::1")
    assert counted._by_address == counted._by_network == {}


def test_one_handshake_too_many_ends_the_oldest() -> None:
    counted = limits(handshakes_in_flight=2)
    assert counted.begin_handshake("first") is None
    assert counted.begin_handshake("second") is None
    assert counted.begin_handshake("third") == "first"
    counted.end_handshake("first")
    counted.end_handshake("second")
    assert counted.begin_handshake("fourth") is None
    assert counted.begin_handshake("fifth") == "third"


def test_one_worker_has_the_whole_limit_and_small_ones_are_not_divided_to_nothing() -> None:
    assert share(10_000, 1) == 10_000
    assert share(4, 2) == 4
    assert share(1, 8) == 1
    assert share(10_000, 2) == 5200


@pytest.mark.parametrize("workers", [2, 4, 16])
def test_a_fleet_within_the_limit_is_not_refused_by_the_luck_of_the_draw(workers: int) -> None:
    drawn = random.Random(7)  # the same draws each time
    for limit in (20, 500, 5_000):
        for _ in range(20):
            counts = [0] * workers
            for _ in range(limit):
                counts[drawn.randrange(workers)] += 1
            assert max(counts) <= share(limit, workers)
