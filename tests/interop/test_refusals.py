"""What a refused device sees on the wire: always the same, whatever the reason. Only log and metrics know better."""

import dataclasses
import secrets
from typing import Literal

import pytest

from tests.interop.conftest import Fleet
from tests.support.gateway import Device
from tests.support.peers import ALERT, Side, WireTap, s_client

MODES = {
    "1.2 PSK": ("-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256"),
    "1.2 PSK, SHA-384": ("-tls1_2", "-cipher", "PSK-AES256-GCM-SHA384"),
    "1.2 ECDHE-PSK": ("-tls1_2", "-cipher", "ECDHE-PSK-CHACHA20-POLY1305"),
    "1.2 ECDHE-PSK, AES-CBC": ("-tls1_2", "-cipher", "ECDHE-PSK-AES128-CBC-SHA256"),
    "1.2 with a hint": ("-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256", "-servername", "hall.example"),
    "1.3": ("-tls1_3",),
    "1.3 with a retry": ("-tls1_3", "-groups", "ffdhe4096:X25519"),
    "defaults": (),
}
BAD_RECORD_MAC = bytes.fromhex("15 0303 0002 02 14")
DECRYPT_ERROR = bytes.fromhex("15 0303 0002 02 33")


@dataclasses.dataclass(frozen=True)
class Sight:
    """A refusal from outside. `course` is who sent what in which order: types of records, and the gateway's sizes."""

    alert: bytes
    course: tuple[tuple[Side, int, int], ...]
    end: Literal["", "fin", "reset"]


def sight_of(port: int, device: Device, options: tuple[str, ...]) -> Sight:
    with WireTap(port) as wire, s_client(wire.port, device, *options) as peer:
        assert peer.ended() == 1
    records = wire.records()
    (alert,) = (record for record in records if record.kind == ALERT)
    assert alert.side == "gateway"
    sizes = tuple((record.side, record.kind, record.size * (record.side == "gateway")) for record in records)
    return Sight(alert.data, sizes, wire.gateway_end)


def refused(fleet: Fleet) -> dict[str, tuple[Device, str]]:
    """Devices that may not connect: what is wrong with each, and the outcome that the gateway knows it by."""
    key = secrets.token_hex(32)
    return {
        "wrong key": (Device("meter", key), "wrong_key"),
        "unknown": (Device("nobody", key), "unknown_identity"),
        "unknown, with the key of another": (Device("nobody", fleet["meter"].key), "unknown_identity"),
        "disabled": (fleet["disabled"], "disabled"),
        "disabled, wrong key": (Device("disabled", key), "disabled"),
        "wrong network": (fleet["elsewhere"], "address_refused"),
        "expired": (fleet["expired"], "expired"),
        "not yet valid": (fleet["early"], "not_yet_valid"),
    }


@pytest.mark.parametrize("mode", MODES)
def test_all_refusals_look_the_same(fleet: Fleet, mode: str) -> None:
    sights: dict[str, Sight] = {}
    for kind, (device, outcome) in refused(fleet).items():
        before = fleet.gateway.metric_by("outcome", "pskgw_handshakes_total")
        sights[kind] = sight_of(fleet.port, device, MODES[mode])
        if mode == "1.2 with a hint" and device.identity != "meter":
            outcome = "unknown_identity"  # noqa: PLW2901 - that realm has this one device
        after = fleet.gateway.metric_by("outcome", "pskgw_handshakes_total")
        assert after - before == {outcome: 1}, kind
        (*_, entry) = fleet.gateway.events("handshake_failed")
        assert (entry["outcome"], entry["identity"]) == (outcome, device.identity), kind

    expected = sights["wrong key"]
    assert expected.alert == (BAD_RECORD_MAC if mode.startswith("1.2") else DECRYPT_ERROR)
    assert expected.end == "fin"
    assert {kind: sight for kind, sight in sights.items() if sight != expected} == {}


@pytest.mark.parametrize("mode", MODES)
def test_the_right_key_is_let_in(fleet: Fleet, mode: str) -> None:
    """The counter-test: what is refused above is refused for the device, not for the way it speaks."""
    device = fleet["hall/meter" if mode == "1.2 with a hint" else "meter"]
    with WireTap(fleet.port) as wire, s_client(wire.port, device, *MODES[mode]) as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0


@pytest.mark.parametrize("mode", ["1.2 PSK", "1.3"])
def test_a_decoy_is_the_same_each_time(fleet: Fleet, mode: str) -> None:
    first, second = (sight_of(fleet.port, fleet["expired"], MODES[mode]) for _ in range(2))
    assert first == second
