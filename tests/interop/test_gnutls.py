"""`gnutls-cli`, as Debian has it."""

import signal

import pytest

from tests.interop.conftest import Fleet
from tests.support.gateway import Device
from tests.support.peers import Peer, gnutls_cli

CASES = {
    "NORMAL:+ECDHE-PSK:+PSK": "TLS1.3",
    "NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK": "TLS1.3",
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK:+PSK": "TLS1.3",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:+PSK": "TLS1.2",
    "NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+PSK": "TLS1.2",
    "NORMAL:+PSK": "TLS1.2",  # its TLS 1.3 would be psk_ke, without forward secrecy, which no profile allows
    "SECURE256:-KX-ALL:+PSK": "TLS1.2",
}


@pytest.mark.parametrize("priority", CASES)
def test_priorities(fleet: Fleet, priority: str) -> None:
    with gnutls_cli(fleet.port, fleet["meter"], priority) as peer:
        peer.expect(rf"^- Description: \({CASES[priority]}-")
        fleet.arrives(peer)
        finish(peer)


def finish(peer: Peer) -> None:
    """End the session; gnutls-cli tells a close_notify from a mere end of the connection."""
    peer.end_input()
    peer.expect(r"^- Peer has closed the GnuTLS connection\n")
    assert peer.ended() == 0


def test_ecdhe_in_tls12(fleet: Fleet) -> None:
    """The handshake succeeds; then gnutls-cli 3.7 crashes in its own description of an ECDHE-PSK session."""
    labels = {"outcome": "ok", "cipher": "ECDHE-PSK-CHACHA20-POLY1305"}
    before = fleet.gateway.metric("pskgw_handshakes_total", **labels)
    with gnutls_cli(fleet.port, fleet["meter"], "NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+ECDHE-PSK") as peer:
        peer.end_input()
        assert peer.ended() in (0, -signal.SIGSEGV)
    assert fleet.gateway.metric("pskgw_handshakes_total", **labels) == before + 1


def test_tls13_without_forward_secrecy(fleet: Fleet) -> None:
    """psk_ke, and no other version to fall back to."""
    with gnutls_cli(fleet.port, fleet["meter"], "NORMAL:-VERS-ALL:+VERS-TLS1.3:+PSK") as peer:
        peer.expect(r"Received alert \[40\]")  # handshake_failure
        assert peer.ended() == 1
    (*_, entry) = fleet.gateway.events("handshake_failed")
    assert (entry["outcome"], entry["identity"]) == ("no_shared_cipher", "meter")
    assert "psk_dhe_ke" in entry["reason"]


@pytest.mark.parametrize("priority", ["NORMAL:+ECDHE-PSK:+PSK", "NORMAL:-VERS-ALL:+VERS-TLS1.2:+PSK"])
def test_wrong_key(fleet: Fleet, priority: str) -> None:
    with gnutls_cli(fleet.port, Device("meter", "00" * 32), priority) as peer:
        number = 20 if "TLS1.2" in priority else 51  # bad_record_mac, decrypt_error
        peer.expect(rf"Received alert \[{number}\]")
        assert peer.ended() == 1
