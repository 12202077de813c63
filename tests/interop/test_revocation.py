"""From `gatewayctl` to a device on the wire, within a second: let in, cut off, let in again, kicked."""

import time
from collections.abc import Callable

import pytest

from tests.interop.conftest import Fleet
from tests.support.gateway import Device, wait_for
from tests.support.peers import Peer, s_client

WITHIN_S = 1.0
"""The promise, counted from the end of the command."""
VERSIONS = {"TLS 1.2": "-tls1_2", "TLS 1.3": "-tls1_3"}


def gets_in(fleet: Fleet, device: Device, version: str) -> bool:
    with s_client(fleet.port, device, VERSIONS[version]) as peer:
        peer.end_input()
        return peer.ended() == 0


def in_time(fleet: Fleet, device: Device, version: str, *, wanted: bool) -> None:
    """Connect again and again until it succeeds or fails as wanted."""
    since = time.monotonic()
    wait_for(lambda: gets_in(fleet, device, version) is wanted, WITHIN_S + 5)
    assert time.monotonic() - since < WITHIN_S


def ends_in_time(peer: Peer, command: Callable[[], object]) -> None:
    """The live session is ended in an orderly way."""
    command()
    since = time.monotonic()
    peer.expect(r"^<<< TLS 1\.[23], Alert \[length 0002\], warning close_notify\n")
    assert time.monotonic() - since < WITHIN_S
    assert peer.ended() == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_an_added_device_gets_in(either_loop: Fleet, version: str) -> None:
    device = either_loop.add_by_command(f"new, {version}", "--group", "lines")
    in_time(either_loop, device, version, wanted=True)
    with s_client(either_loop.port, device, VERSIONS[version]) as peer:
        either_loop.arrives(peer)
    either_loop.gateway.ctl("remove-device", device.identity)


@pytest.mark.parametrize("version", VERSIONS)
def test_disabled_and_enabled(either_loop: Fleet, version: str) -> None:
    fleet, device = either_loop, either_loop.take("lines")
    with s_client(fleet.port, device, VERSIONS[version], "-msg") as peer:
        fleet.arrives(peer)
        ends_in_time(peer, lambda: fleet.gateway.ctl("disable-device", device.identity))
    assert not gets_in(fleet, device, version)
    fleet.gateway.wait_for_event("session_stopped", device=device.identity, reason="disabled")
    fleet.gateway.wait_for_event("handshake_failed", identity=device.identity, outcome="disabled")
    fleet.gateway.ctl("enable-device", device.identity)
    in_time(fleet, device, version, wanted=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_removed_and_added_anew(either_loop: Fleet, version: str) -> None:
    """The device that comes after it, with the same identity, has a key of its own."""
    fleet, device = either_loop, either_loop.take("lines")
    with s_client(fleet.port, device, VERSIONS[version], "-msg") as peer:
        fleet.arrives(peer)
        ends_in_time(peer, lambda: fleet.gateway.ctl("remove-device", device.identity))
    assert not gets_in(fleet, device, version)
    fleet.gateway.wait_for_event("session_stopped", device=device.identity, reason="removed")
    fleet.gateway.wait_for_event("handshake_failed", identity=device.identity, outcome="unknown_identity")
    successor = fleet.add_by_command(device.identity, "--group", "lines")
    in_time(fleet, successor, version, wanted=True)
    assert not gets_in(fleet, device, version)
    fleet.gateway.wait_for_event("handshake_failed", identity=device.identity, outcome="wrong_key")


def test_revocation_is_measured(either_loop: Fleet) -> None:
    gateway, device = either_loop.gateway, either_loop.take("lines")
    before = gateway.metric("pskgw_revocation_seconds_count")
    spent = gateway.metric("pskgw_revocation_seconds_sum")
    with s_client(either_loop.port, device, "-msg") as peer:
        either_loop.arrives(peer)
        ends_in_time(peer, lambda: gateway.ctl("disable-device", device.identity))
    assert gateway.metric("pskgw_revocation_seconds_count") == before + 1
    assert gateway.metric("pskgw_revocation_seconds_sum") - spent < WITHIN_S


def test_others_are_left_alone(either_loop: Fleet) -> None:
    fleet, device = either_loop, either_loop.take("lines")
    with s_client(fleet.port, fleet["meter"]) as other, s_client(fleet.port, device, "-msg") as peer:
        fleet.arrives(other)
        fleet.arrives(peer)
        ends_in_time(peer, lambda: fleet.gateway.ctl("disable-device", device.identity))
        fleet.arrives(other)
        assert other.finish() == 0


def test_kicked(either_loop: Fleet) -> None:
    """All sessions of a device end; it may come again."""
    fleet, device = either_loop, either_loop.take("lines")
    with (
        s_client(fleet.port, device, "-tls1_2", "-msg") as first,
        s_client(fleet.port, device, "-tls1_3", "-msg") as second,
    ):
        for peer in (first, second):
            fleet.arrives(peer)
        listed = [session for session in fleet.gateway.sessions() if session["device"] == device.identity]
        assert sorted(session["tls_version"] for session in listed) == ["TLSv1.2", "TLSv1.3"]
        assert {(session["route"], session["received_bytes"] > 0) for session in listed} == {("lines", True)}
        ends_in_time(first, lambda: fleet.gateway.ctl("kick-device", device.identity))
        assert second.ended() == 0
        assert "warning close_notify" in second.output
    assert device.identity not in [session["device"] for session in fleet.gateway.sessions()]
    assert fleet.gateway.ctl("kick-device", device.identity, check=False).returncode == 1
    assert gets_in(fleet, device, "TLS 1.3")
