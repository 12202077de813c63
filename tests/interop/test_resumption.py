"""No resumption: a session or ticket that a client kept neither keeps a good device out nor lets a removed one in.

In TLS 1.3 OpenSSL calls every handshake with a PSK "Reused", so what counts is the identity that the gateway selected.
"""

from pathlib import Path

import pytest

from gateway.wire.client_hello import ClientHello, HelloScanner
from tests.interop.conftest import Fleet
from tests.support.gateway import Device
from tests.support.peers import Peer, WireTap, node, openssl, s_client, s_server
from tests.support.raw_hello import selected_identity

TLS12 = ("-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256")


def hello(wire: WireTap) -> ClientHello:
    """What the client offered."""
    scanned = HelloScanner().feed(b"".join(record.data for record in wire.records("device")))
    assert scanned is not None
    return scanned


def remove(fleet: Fleet, device: Device) -> None:
    with fleet.change() as registry:
        registry.remove_device("default", device.identity)


def keeps_a_ticket(fleet: Fleet, device: Device, path: Path) -> None:
    """A first connection, in TLS 1.3, that keeps the ticket that OpenSSL sends whatever it is told."""
    with s_client(fleet.port, device, "-tls1_3", "-sess_out", path) as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0
    assert "TLS session ticket:" in openssl("sess_id", "-in", path, "-noout", "-text").stdout


def refused(peer: Peer) -> bool:
    """Whether there was no session, and an alert said so."""
    return peer.ended() == 1 and "SSL alert number" in peer.output


def test_tls13_ticket_beside_the_identity(either_loop: Fleet, tmp_path: Path) -> None:
    fleet, device = either_loop, either_loop.take("lines")
    keeps_a_ticket(fleet, device, tmp_path / "session")
    for options in ((), ("-groups", "ffdhe4096:X25519")):  # the second one with a HelloRetryRequest
        with WireTap(fleet.port) as wire:
            with s_client(wire.port, device, *options, "-sess_in", tmp_path / "session") as peer:
                fleet.arrives(peer)
                assert peer.finish() == 0
            ticket, identity = (psk.identity for psk in hello(wire).psks)
            assert identity == device.identity.encode()
            assert ticket != identity
            assert selected_identity(wire.records("gateway")[0].data) == (
                1 if not options else None
            )  # the retry names none
    remove(fleet, device)
    with s_client(fleet.port, device, "-sess_in", tmp_path / "session") as peer:
        assert refused(peer)


def test_tls13_ticket_alone(either_loop: Fleet, tmp_path: Path) -> None:
    fleet, device = either_loop, either_loop.take("lines")
    keeps_a_ticket(fleet, device, tmp_path / "session")
    for options in ((), ("-tls1_3",)):
        with WireTap(fleet.port) as wire:
            with s_client(wire.port, None, *options, "-sess_in", tmp_path / "session") as peer:
                assert refused(peer)
            assert len(hello(wire).psks) == 1


def test_tls12_leaves_nothing_to_keep(either_loop: Fleet, tmp_path: Path) -> None:
    device = either_loop["meter"]
    with s_client(either_loop.port, device, *TLS12, "-sess_out", tmp_path / "session", "-msg") as peer:
        either_loop.arrives(peer)
        assert peer.finish() == 0
        assert "NewSessionTicket" not in peer.output
        assert "Session-ID: \n" in peer.output
    assert not (tmp_path / "session").exists()


@pytest.mark.parametrize("kept", ["-ticket", "-no_ticket"])
def test_tls12_session_of_another_server(either_loop: Fleet, tmp_path: Path, kept: str) -> None:
    """From a server that does resume, by a ticket or by an id, and that had the same key: a fleet that moved here."""
    fleet, device = either_loop, either_loop.take("lines")
    options = () if kept == "-ticket" else (kept,)
    with s_server(device, "-tls1_2", *options) as port:
        for path in ("-sess_out", "-sess_in"):  # the second one shows that this session does resume there
            with s_client(port, device, *TLS12, path, tmp_path / "session") as peer:
                reused = peer.expect(r"^(New|Reused), TLSv1\.2").group(1)
                peer.expect(r"Extended master secret")
                peer.finish()
        assert reused == "Reused"
    with s_client(fleet.port, device, *TLS12, "-sess_in", tmp_path / "session") as peer:
        peer.expect(r"^New, TLSv1\.2")
        fleet.arrives(peer)
        assert peer.finish() == 0
        assert "Reused" not in peer.output
    remove(fleet, device)
    with s_client(fleet.port, device, *TLS12, "-sess_in", tmp_path / "session") as peer:
        assert refused(peer)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_node_keeps_its_session(either_loop: Fleet, tmp_path: Path, version: str) -> None:
    fleet, device = either_loop, either_loop.take("lines")
    options = {"minVersion": version, "maxVersion": version, "ciphers": "PSK"}
    with node(fleet.port, device, **options, saveSession=str(tmp_path / "session")) as peer:
        fleet.arrives(peer, "data ")
        assert peer.finish() == 0
    for _ in range(2):
        with WireTap(fleet.port) as wire:
            with node(wire.port, device, **options, loadSession=str(tmp_path / "session")) as peer:
                reused = peer.expect(r"^secure \S+ \S+ alpn \S+ reused (\S+)\n").group(1)
                fleet.arrives(peer, "data ")
                assert peer.finish() == 0
            if version == "TLSv1.2":
                assert reused == "false"
            else:
                assert len(hello(wire).psks) == 2
                assert selected_identity(wire.records("gateway")[0].data) == 1
    remove(fleet, device)
    with node(fleet.port, device, **options, loadSession=str(tmp_path / "session")) as peer:
        peer.expect(r"^error ERR_SSL_\S*ALERT\S*\n")
        peer.ended()
        assert "secure" not in peer.output
