"""`openssl s_client`, as Debian has it."""

import re
import secrets
from pathlib import Path

import pytest

from gateway.registry.sealing import Key
from gateway.registry.store import NewDevice
from gateway.tls.profiles import PROFILES, ProfileName
from tests.interop.conftest import HINT, Fleet
from tests.support.gateway import Device, wait_for
from tests.support.peers import Peer, openssl, openssl_knows, s_client, s_server

TLS12_SUITES = PROFILES[ProfileName.COMPATIBLE].tls12_suites
RETRY_RANDOM = "cf 21 ad 74 e5 9a 61 11 be 1d 8c 02 1e 65 b8 91"
"""The first half of the random of a ServerHello that is a HelloRetryRequest (RFC 8446 section 4.1.3)."""


def agreed(peer: Peer) -> tuple[str, str]:
    """Version and suite, as `s_client -brief` says them."""
    found = peer.expect(r"^Protocol version: (\S+)\nCiphersuite: (\S+)\n")
    return found.group(1), found.group(2)


@pytest.mark.parametrize("suite", TLS12_SUITES)
def test_every_tls12_suite(fleet: Fleet, suite: str) -> None:
    if not openssl_knows(suite):
        pytest.skip(f"this openssl has no {suite}")
    with s_client(fleet.port, fleet["meter"], "-brief", "-tls1_2", "-cipher", suite) as peer:
        assert agreed(peer) == ("TLSv1.2", suite)
        event = fleet.arrives(peer)
        assert peer.finish() == 0
    assert (event["device"], event["realm"]) == ("meter", "default")
    assert fleet.gateway.metric(
        "pskgw_handshakes_total", listener="tls", outcome="ok", tls_version="TLSv1.2", cipher=suite
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ("TLSv1.3", "TLS_AES_128_GCM_SHA256")),
        (("-tls1_2",), ("TLSv1.2", "ECDHE-PSK-CHACHA20-POLY1305")),
        (("-tls1_3",), ("TLSv1.3", "TLS_AES_128_GCM_SHA256")),
        (("-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256"), ("TLSv1.3", "TLS_AES_128_GCM_SHA256")),
        (("-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"), ("TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256")),
        (("-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_SHA256"), ("TLSv1.3", "TLS_AES_128_CCM_SHA256")),
    ],
)  # fmt: skip
def test_versions_and_suites(fleet: Fleet, options: tuple[str, ...], expected: tuple[str, str]) -> None:
    with s_client(fleet.port, fleet["meter"], "-brief", *options) as peer:
        assert agreed(peer) == expected
        fleet.arrives(peer)
        assert peer.finish() == 0


@pytest.mark.parametrize("suite", ["PSK-AES128-GCM-SHA256", "ECDHE-PSK-CHACHA20-POLY1305"])
@pytest.mark.parametrize(
    "signatures",
    ["RSA+SHA1", "ECDSA+SHA1:RSA+SHA1:DSA+SHA1", "ed25519", "ECDSA+SHA384:RSA+SHA512", "RSA+SHA1:RSA+SHA256"],
)
def test_signature_algorithms_do_not_matter(fleet: Fleet, signatures: str, suite: str) -> None:
    """Nothing is signed with a PSK: old devices that know SHA-1 alone are as welcome as others."""
    options = ("-brief", "-tls1_2", "-cipher", f"{suite}:@SECLEVEL=0", "-sigalgs", signatures)
    with s_client(fleet.port, fleet["meter"], *options) as peer:
        assert agreed(peer) == ("TLSv1.2", suite)
        fleet.arrives(peer)
        assert peer.finish() == 0


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("name", ["Zähler 8 ☀", "x" * 128, "here"])
def test_identities(fleet: Fleet, name: str, version: str) -> None:
    with s_client(fleet.port, fleet[name], version) as peer:
        event = fleet.arrives(peer)
        assert peer.finish() == 0
    assert event["device"] == name


@pytest.mark.parametrize("options", [("-tls1_3",), ("-tls1_2", "-cipher", "ECDHE-PSK-CHACHA20-POLY1305"), ()])
def test_modern_accepts_forward_secrecy(fleet: Fleet, options: tuple[str, ...]) -> None:
    with s_client(fleet.gateway.port("modern"), fleet["meter"], *options) as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0


@pytest.mark.parametrize("suite", [suite for suite in TLS12_SUITES if suite != "ECDHE-PSK-CHACHA20-POLY1305"])
def test_modern_refuses_the_rest(fleet: Fleet, suite: str) -> None:
    def refused() -> float:
        return fleet.gateway.metric("pskgw_handshakes_total", listener="modern", outcome="no_shared_cipher")

    before = refused()
    with s_client(fleet.gateway.port("modern"), fleet["meter"], "-tls1_2", "-cipher", suite) as peer:
        assert peer.ended() == 1
        assert "SSL alert number 40" in peer.output  # handshake_failure
    assert refused() == before + 1
    (*_, entry) = fleet.gateway.events("handshake_failed")
    assert (entry["listener"], entry["outcome"]) == ("modern", "no_shared_cipher")
    assert entry["offered"] == [suite, "TLS_EMPTY_RENEGOTIATION_INFO_SCSV"]
    assert "ECDHE-PSK-CHACHA20-POLY1305" in entry["allowed"]
    assert suite not in entry["allowed"]


@pytest.mark.parametrize("suite", ["PSK-AES128-GCM-SHA256", "ECDHE-PSK-CHACHA20-POLY1305"])
def test_hint_is_seen_in_tls12(fleet: Fleet, suite: str) -> None:
    options = ("-tls1_2", "-cipher", suite, "-servername", "hall.example", "-msg")
    with s_client(fleet.port, fleet["hall/meter"], *options) as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0
        assert f"PSK identity hint: {HINT}\n" in peer.output
        assert len(HINT.encode()).to_bytes(2) + HINT.encode() in server_key_exchange(peer)


def test_no_hint_is_no_message(fleet: Fleet) -> None:
    """Plain PSK has a ServerKeyExchange only for a hint (RFC 4279 section 2): an empty one confuses clients."""
    with s_client(fleet.port, fleet["meter"], "-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256", "-msg") as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0
        assert "PSK identity hint: None\n" in peer.output
        assert "ServerHelloDone" in peer.output
        assert "ServerKeyExchange" not in peer.output


def test_no_hint_with_ecdhe(fleet: Fleet) -> None:
    """Here the message comes in any case, and its hint has no bytes (RFC 5489 section 2)."""
    with s_client(
        fleet.port, fleet["meter"], "-tls1_2", "-cipher", "ECDHE-PSK-CHACHA20-POLY1305", "-msg"
    ) as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0
        assert "PSK identity hint: None\n" in peer.output
        assert server_key_exchange(peer)[4:6] == b"\0\0"


def test_tls13_has_no_hint(fleet: Fleet) -> None:
    with s_client(fleet.port, fleet["hall/meter"], "-tls1_3", "-servername", "hall.example") as peer:
        event = fleet.arrives(peer)
        assert peer.finish() == 0
        assert HINT not in peer.output
    assert event["realm"] == "hall"


def server_key_exchange(peer: Peer) -> bytes:
    """The message as `-msg` dumps it."""
    found = re.search(r"ServerKeyExchange\n((?:    [0-9a-f ]+\n)+)", peer.output)
    assert found, peer.output
    return bytes.fromhex(found.group(1))


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(
    ("server_name", "realm"),
    [("north.example", "north"), ("NORTH.Example", "north"), ("hall.example", "hall"), ("south.example", "default"), (None, "default")],
)  # fmt: skip
def test_realm_by_server_name(fleet: Fleet, version: str, server_name: str | None, realm: str) -> None:
    """One identity, three devices: the same text with a key of its own in each realm."""
    name = "-noservername" if server_name is None else f"-servername={server_name}"
    keys = {"default": fleet["meter"], "north": fleet["north/meter"], "hall": fleet["hall/meter"]}
    assert {device.identity for device in keys.values()} == {"meter"}
    with s_client(fleet.port, keys.pop(realm), version, *name.split("=")) as peer:
        event = fleet.arrives(peer)
        assert peer.finish() == 0
    assert (event["realm"], event["source"]) == (realm, f"/realms/{realm}/devices/meter")
    for device in keys.values():
        with s_client(fleet.port, device, version, *name.split("=")) as peer:
            assert peer.ended() == 1


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(
    ("offered", "chosen", "file"),
    [
        ("readings/1", "readings/1", "events.jsonl"),
        ("readings/2", "readings/2", "second.jsonl"),
        ("h2,readings/2", "readings/2", "second.jsonl"),
        ("readings/1,readings/2", "readings/2", "second.jsonl"),  # as the routes stand
        ("h2", None, "events.jsonl"),
    ],
)
def test_alpn_chooses_the_route(
    fleet: Fleet, version: str, offered: str, chosen: str | None, file: str
) -> None:
    with s_client(fleet.port, fleet["meter"], version, "-alpn", offered) as peer:
        fleet.arrives(peer, file=file)
        assert peer.finish() == 0
        assert ("No ALPN negotiated" if chosen is None else f"ALPN protocol: {chosen}") in peer.output


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_no_route_is_an_orderly_end(fleet: Fleet, version: str) -> None:
    """The key was right, so the device may know: close_notify, not an alert."""
    with s_client(fleet.port, fleet["nowhere"], version, "-msg") as peer:
        peer.expect(r"^<<< TLS 1\.[23], Alert \[length 0002\], warning close_notify\n")
        assert peer.ended() == 0
    entry = fleet.gateway.wait_for_event("handshake_failed", identity="nowhere")
    assert entry["outcome"] == "no_route"


@pytest.mark.parametrize("groups", ["ffdhe4096:X25519", "P-521:X25519", "X448:P-256"])
@pytest.mark.parametrize("options", [(), ("-tls1_3", "-servername", "north.example")])
def test_hello_retry_request(fleet: Fleet, options: tuple[str, ...], groups: str) -> None:
    """The first key share is of a group that the server does not have, or likes less than another one on offer."""
    device = fleet["north/meter" if options else "meter"]
    with s_client(fleet.port, device, *options, "-groups", groups, "-msg") as peer:
        fleet.arrives(peer)
        assert peer.finish() == 0
        assert len(re.findall(r"^>>> TLS 1\.3, Handshake .*, ClientHello$", peer.output, re.MULTILINE)) == 2
        assert len(re.findall(r"^<<< TLS 1\.3, Handshake .*, ServerHello$", peer.output, re.MULTILINE)) == 2
        dump = " ".join(re.findall(r"^    ((?:[0-9a-f]{2} ?)+)$", peer.output, re.MULTILINE))
        assert dump.count(RETRY_RANDOM) == 1


def test_credential_bound_to_sha384(fleet: Fleet, tmp_path: Path) -> None:
    """`-psk` is for SHA-256 in TLS 1.3; `-psk_session` takes key and hash from a session, here of another server."""
    session, certificate = tmp_path / "session", ("-cert", tmp_path / "cert", "-key", tmp_path / "key")
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=other",
        "-out", certificate[1], "-keyout", certificate[3],
    )  # fmt: skip
    suite = ("-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384")
    with s_server(None, *certificate, *suite) as port, s_client(port, None, "-sess_out", session) as peer:
        wait_for(session.exists, what="a ticket")
        peer.finish()
    text = openssl("sess_id", "-in", session, "-noout", "-text").stdout
    found = re.search(r"Resumption PSK: ([0-9A-F]{96})$", text, re.MULTILINE)
    assert found, text
    key = Key(bytes.fromhex(found.group(1)))
    identity = f"long-{secrets.token_hex(4)}"  # another one when the test is tried again
    with fleet.change() as registry:
        registry.add_device(NewDevice(identity=identity, group="lines", key=key, hash="sha384"))
    with s_client(fleet.port, None, "-brief", "-psk_identity", identity, "-psk_session", session) as peer:
        assert agreed(peer) == ("TLSv1.3", "TLS_AES_256_GCM_SHA384")
        fleet.arrives(peer)
        assert peer.finish() == 0
    with s_client(fleet.port, Device(identity, key.hex()), "-tls1_3") as peer:
        assert peer.ended() == 1
        assert "SSL alert number 51" in peer.output  # decrypt_error, as for any wrong key
    with s_client(fleet.port, Device(identity, key.hex()), "-brief", "-tls1_2") as peer:
        assert agreed(peer)[0] == "TLSv1.2"
        fleet.arrives(peer)
        assert peer.finish() == 0


def test_lines_are_answered_in_order(fleet: Fleet) -> None:
    with s_client(fleet.port, fleet["meter"]) as peer:
        peer.send("".join(f"burst {number}\n" for number in range(1, 201)))
        for number in range(1, 201):
            assert peer.expect(r"^ok (\d+)\n").group(1) == str(number)
        assert peer.finish() == 0
    burst = [event for event in fleet.gateway.output_events() if event["data"].startswith("burst ")]
    assert [event["data"] for event in burst] == [f"burst {number}" for number in range(1, 201)]
    assert [int(event["sequence"]) for event in burst] == list(range(1, 201))
    assert len({event["id"].rpartition("-")[0] for event in burst}) == 1


def test_renegotiation_is_refused(fleet: Fleet) -> None:
    """`R` asks s_client to renegotiate: the answer is the warning no_renegotiation, at which OpenSSL gives up."""
    with s_client(fleet.port, fleet["meter"], "-tls1_2") as peer:
        fleet.arrives(peer)
        peer.send("R")
        peer.expect("RENEGOTIATING")
        peer.expect("no renegotiation")
        assert peer.finish() == 1
