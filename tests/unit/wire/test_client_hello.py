from pathlib import Path

import pytest

from gateway.errors import PeerError, PeerFault
from gateway.wire.client_hello import (
    ClientHello,
    HelloScanner,
    OfferedPsk,
    decode_client_hello,
    suite_name,
)

VECTORS = Path(__file__).parent / "vectors"
IDENTITY = OfferedPsk(b"device-1", 32)

SERVER_NAME, GROUPS, SIGNATURES, ALPN, PSK, VERSIONS, PSK_MODES = 0, 10, 13, 16, 41, 43, 45


def vector(name: str) -> bytes:
    return bytes.fromhex((VECTORS / f"{name}.hex").read_text())


def scan(data: bytes, **settings: int) -> ClientHello | None:
    return HelloScanner(**settings).feed(data)


def sized(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size) + data


def body(
    *extensions: tuple[int, bytes],
    version: int = 0x0303,
    session_id: bytes = b"",
    suites: bytes = b"\x00\xa8",
    compressions: bytes = b"\x00",
    after: bytes = b"",
) -> bytes:
    """A ClientHello by hand; without extensions there is no extensions block at all."""
    block = b"".join(kind.to_bytes(2) + sized(data) for kind, data in extensions)
    return (
        version.to_bytes(2)
        + bytes(32)
        + sized(session_id, 1)
        + sized(suites)
        + sized(compressions, 1)
        + (sized(block) if extensions else b"")
        + after
    )


def message(content: bytes, kind: int = 1) -> bytes:
    return bytes([kind]) + sized(content, 3)


def record(fragment: bytes, kind: int = 22, major: int = 3) -> bytes:
    return bytes([kind, major, 1]) + sized(fragment)


def psk_extension(identities: list[bytes], binders: list[bytes]) -> tuple[int, bytes]:
    listed = b"".join(sized(identity) + bytes(4) for identity in identities)
    return PSK, sized(listed) + sized(b"".join(sized(binder, 1) for binder in binders))


def feed_bytewise(scanner: HelloScanner, data: bytes) -> None:
    for at in range(len(data)):
        assert scanner.feed(data[at : at + 1]) is None


def refusal(data: bytes, **settings: int) -> PeerError:
    """The error of feeding everything at once, which must be that of feeding byte by byte."""
    with pytest.raises(PeerError) as at_once:
        scan(data, **settings)
    scanner = HelloScanner(**settings)
    with pytest.raises(PeerError) as bytewise:
        feed_bytewise(scanner, data)
    assert bytewise.value.args == at_once.value.args
    return at_once.value


GOOD_PSK = psk_extension([b"a"], [bytes(32)])
MALFORMED = {
    "nothing": b"",
    "cut in the random": body()[:20],
    "cut in the suites": body()[:38],
    "session id of 33 bytes": body(session_id=bytes(33)),
    "no suite": body(suites=b""),
    "half a suite": body(suites=b"\x00\xa8\x00"),
    "no compression": body(compressions=b""),
    "compressions past the end": body()[:-1],
    "one byte after": body(after=b"\x00"),
    "bytes after the extensions": body((GROUPS, b"\x00\x02\x00\x1d"), after=b"\x00"),
    "extension past the end": body(after=sized(b"\x00\x0a\x00\x05\x00")),
    "half an extension header": body(after=sized(b"\x00\x0a\x00")),
    "extension twice": body((0x1A1A, b""), (0x1A1A, b"")),
    "psk empty": body((PSK, b"")),
    "psk without identities": body(psk_extension([], [bytes(32)])),
    "psk with an empty identity": body(psk_extension([b""], [bytes(32)])),
    "psk without binders": body(psk_extension([b"a"], [])),
    "psk with a short binder": body(psk_extension([b"a"], [bytes(31)])),
    "more identities than binders": body(psk_extension([b"a", b"b"], [bytes(32)])),
    "more binders than identities": body(psk_extension([b"a"], [bytes(32), bytes(32)])),
    "psk with bytes after": body((PSK, GOOD_PSK[1] + b"\x00")),
    "psk cut": body((PSK, GOOD_PSK[1][:-1])),
    "binder past the end": body((PSK, sized(sized(b"a") + bytes(4)) + sized(b"\x21" + bytes(32)))),
    "identity past its list": body((PSK, b"\x00\x07\x00\x02a" + bytes(4) + sized(b"\x20" + bytes(32)))),
    "versions empty": body((VERSIONS, b"\x00")),
    "versions missing": body((VERSIONS, b"")),
    "versions odd": body((VERSIONS, b"\x03\x03\x04\x03")),
    "versions with bytes after": body((VERSIONS, b"\x02\x03\x04\x00")),
    "groups empty": body((GROUPS, b"\x00\x00")),
    "groups odd": body((GROUPS, b"\x00\x01\x00")),
    "groups with bytes after": body((GROUPS, b"\x00\x02\x00\x1d\x00")),
    "signatures empty": body((SIGNATURES, b"\x00\x00")),
    "signatures odd": body((SIGNATURES, b"\x00\x03\x04\x03\x04")),
    "signatures with bytes after": body((SIGNATURES, b"\x00\x02\x04\x03\x00")),
    "psk modes missing": body((PSK_MODES, b"")),
    "psk modes empty": body((PSK_MODES, b"\x00")),
    "psk modes cut": body((PSK_MODES, b"\x02\x01")),
    "psk modes with bytes after": body((PSK_MODES, b"\x01\x01\x00")),
    "alpn empty": body((ALPN, b"\x00\x00")),
    "alpn with an empty name": body((ALPN, sized(b"\x00"))),
    "alpn name past the end": body((ALPN, sized(b"\x05mqtt"))),
    "alpn with bytes after": body((ALPN, sized(b"\x04mqtt") + b"\x00")),
    "server name empty": body((SERVER_NAME, b"")),
    "server name list empty": body((SERVER_NAME, b"\x00\x00")),
    "server name without letters": body((SERVER_NAME, sized(b"\x00\x00\x00"))),
    "two host names": body((SERVER_NAME, sized((b"\x00" + sized(b"a")) * 2))),
    "server name past the end": body((SERVER_NAME, sized(b"\x00\x00\x05host"))),
    "server name with bytes after": body((SERVER_NAME, sized(b"\x00" + sized(b"a")) + b"\x00")),
}


class TestRealClients:
    @pytest.mark.parametrize(
        ("name", "versions", "psks", "server_name", "alpn"),
        [
            ("openssl-defaults", (0x0304, 0x0303, 0x0302, 0x0301), (IDENTITY,), None, ()),
            ("openssl-tls12-psk", (0x0303,), (), None, ()),
            ("openssl-tls12-ecdhe-psk", (0x0303,), (), None, ()),
            (
                "openssl-tls13-sni-alpn",
                (0x0304,),
                (IDENTITY,),
                "gateway.example",
                (b"mqtt", b"x-amzn-mqtt-ca"),
            ),
            ("openssl-legacy-tls10", (0x0301,), (), None, ()),
            ("openssl-certificate-only", (0x0304, 0x0303, 0x0302, 0x0301), (), None, ()),
            ("node-defaults", (0x0304, 0x0303), (IDENTITY,), None, ()),
            ("node-tls12-psk", (0x0303,), (), "gateway.example", (b"mqtt",)),
            ("gnutls-defaults", (0x0304, 0x0303, 0x0302, 0x0301), (IDENTITY,), None, ()),
            ("gnutls-tls12-psk", (0x0303,), (), None, ()),
            ("gnutls-psk-ke", (0x0304, 0x0303, 0x0302, 0x0301), (IDENTITY,), None, ()),
            ("mosquitto-pub", (0x0304, 0x0303), (IDENTITY,), "127.0.0.1", ()),
        ],
    )
    def test_hello(
        self,
        name: str,
        versions: tuple[int, ...],
        psks: tuple[OfferedPsk, ...],
        server_name: str | None,
        alpn: tuple[bytes, ...],
    ) -> None:
        hello = scan(vector(name))
        assert hello is not None
        assert hello.versions == versions
        assert hello.psks == psks
        assert hello.server_name == server_name
        assert hello.alpn == alpn
        assert hello.offers_tls13 == (0x0304 in versions)
        assert hello.legacy_version == min(versions[0], 0x0303)

    def test_suites_and_groups(self) -> None:
        hello = scan(vector("openssl-tls12-ecdhe-psk"))
        assert hello is not None
        assert [suite_name(code) for code in hello.suites] == [
            "ECDHE-PSK-CHACHA20-POLY1305",
            "TLS_EMPTY_RENEGOTIATION_INFO_SCSV",
        ]
        assert hello.groups == (0x001D, 0x0017, 0x001E, 0x0019, 0x0018)

    def test_signatures(self) -> None:
        hello = scan(vector("gnutls-tls12-psk"))
        assert hello is not None
        assert hello.signatures[:4] == (0x0401, 0x0809, 0x0804, 0x0403)

    @pytest.mark.parametrize(
        ("name", "modes"),
        [
            ("openssl-defaults", (1,)),
            ("node-defaults", (1,)),
            ("gnutls-defaults", (1, 0)),
            ("gnutls-psk-ke", (0,)),
            ("openssl-tls12-psk", ()),
        ],
    )
    def test_psk_modes(self, name: str, modes: tuple[int, ...]) -> None:
        hello = scan(vector(name))
        assert hello is not None
        assert hello.psk_modes == modes
        assert hello.offers_psk_dhe_ke == (1 in modes)

    def test_ticket_stands_before_the_identity(self) -> None:
        hello = scan(vector("openssl-ticket-and-identity"))
        assert hello is not None
        ticket, identity = hello.psks
        assert identity == IDENTITY
        assert len(ticket.identity) > 100
        assert ticket.binder_length == 32

    def test_plain_http(self) -> None:
        error = refusal(vector("curl-http"))
        assert error.fault is PeerFault.NOT_TLS
        assert "HTTP" in str(error)

    @pytest.mark.parametrize(
        "name", sorted(path.stem for path in VECTORS.glob("*.hex") if path.stem != "curl-http")
    )
    def test_byte_by_byte(self, name: str) -> None:
        data = vector(name)
        scanner = HelloScanner()
        for at in range(len(data) - 1):
            assert scanner.feed(data[at : at + 1]) is None
        assert scanner.feed(data[-1:]) == scan(data)
        assert scanner.received == data


class TestRecords:
    def test_what_follows_the_hello_is_kept(self) -> None:
        scanner = HelloScanner()
        data = record(message(body())) + b"\x14\x03\x03\x00\x01\x01early"
        assert scanner.feed(data) is not None
        assert scanner.received == data

    def test_what_follows_in_the_same_record_is_for_openssl(self) -> None:
        assert scan(record(message(body()) + b"more")) is not None

    @pytest.mark.parametrize("kind", [20, 21, 23, 24])
    def test_other_content_before_the_hello(self, kind: int) -> None:
        assert refusal(record(b"x", kind=kind)).fault is PeerFault.UNSUPPORTED_RECORD

    @pytest.mark.parametrize("kind", [0, 20, 21, 23, 255])
    def test_other_content_inside_the_hello(self, kind: int) -> None:
        whole = message(body())
        error = refusal(record(whole[:20]) + record(whole[20:], kind=kind))
        assert error.fault is PeerFault.UNSUPPORTED_RECORD
        assert str(kind) in str(error)

    @pytest.mark.parametrize(
        ("data", "word"),
        [
            (b"GET / HTTP/1.1\r\n", "HTTP"),
            (b"OPTIONS * HTTP/1.1\r\n", "HTTP"),
            (b"PRI * HTTP/2.0\r\n\r\nSM", "HTTP"),
            (b"GETTING", "0x47"),
            (b"SSH-2.0-x", "0x53"),
            (b"\x10\x0e\x00\x04MQTT", "MQTT"),
            (b"\x80\x2e\x01\x00\x02", "SSL 2.0"),
            (b"\x80\x2e\x04\x00\x02", "0x80"),
            (b"\x00", "0x00"),
            (b"\x15\x02", "0x15"),
            (b"\x16\xfe\xfd\x00\x00", "254"),
            (b"\x16\x02\x00\x00\x04", "2.x"),
        ],
    )
    def test_not_tls(self, data: bytes, word: str) -> None:
        error = refusal(data)
        assert error.fault is PeerFault.NOT_TLS
        assert word in str(error)

    @pytest.mark.parametrize(
        "data", [b"", b"G", b"CONNEC", b"\x80", b"\x80\x2e", b"\x15", b"\x16\x03\x01\x00"]
    )
    def test_waits_while_undecided(self, data: bytes) -> None:
        assert scan(data) is None

    def test_version_of_a_later_record(self) -> None:
        whole = message(body())
        error = refusal(record(whole[:20]) + record(whole[20:], major=4))
        assert error.fault is PeerFault.MALFORMED

    def test_record_too_long(self) -> None:
        assert refusal(b"\x16\x03\x01\x40\x01").fault is PeerFault.RECORD_OVERFLOW
        assert scan(b"\x16\x03\x01\x40\x00") is None

    def test_record_without_content(self) -> None:
        assert refusal(record(b"")).fault is PeerFault.MALFORMED
        assert refusal(record(b"\x01") + record(b"")).fault is PeerFault.MALFORMED

    @pytest.mark.parametrize("kind", [0, 2, 16])
    def test_another_handshake_message(self, kind: int) -> None:
        assert refusal(record(message(body(), kind=kind))).fault is PeerFault.UNSUPPORTED_RECORD

    def test_bound_counts_the_wire(self) -> None:
        whole = message(body())
        one = record(whole)
        assert scan(one, hello_bytes_max=len(one)) is not None
        assert refusal(one, hello_bytes_max=len(one) - 1).fault is PeerFault.OVERSIZED
        two = record(whole[:10]) + record(whole[10:])
        assert scan(two, hello_bytes_max=len(two)) is not None
        assert refusal(two, hello_bytes_max=len(two) - 1).fault is PeerFault.OVERSIZED

    def test_announced_length_is_enough_to_refuse(self) -> None:
        assert refusal(record(b"\x01\xff\xff\xff")).fault is PeerFault.OVERSIZED
        assert refusal(b"\x16\x03\x01\x20\x00\x01\x00\x40\x00").fault is PeerFault.OVERSIZED

    def test_one_byte_records_do_not_pass_the_bound(self) -> None:
        scanner = HelloScanner(hello_bytes_max=1000)
        with pytest.raises(PeerError) as caught:
            feed_bytewise(scanner, b"".join(record(each.to_bytes()) for each in message(bytes(400))))
        assert caught.value.fault is PeerFault.OVERSIZED
        assert len(scanner.received) <= 1006


class TestMessage:
    def test_without_extensions(self) -> None:
        assert decode_client_hello(body(version=0x0300)) == ClientHello(
            legacy_version=0x0300,
            versions=(0x0300,),
            suites=(0x00A8,),
            server_name=None,
            alpn=(),
            psks=(),
            groups=(),
        )

    def test_legacy_version_never_offers_tls13(self) -> None:
        hello = decode_client_hello(body(version=0x0304))
        assert hello.versions == (0x0303,)
        assert not hello.offers_tls13

    def test_supported_versions_rule(self) -> None:
        hello = decode_client_hello(body((VERSIONS, b"\x04\x7a\x7a\x03\x04"), version=0x0303))
        assert hello.versions == (0x7A7A, 0x0304)
        assert hello.offers_tls13

    def test_unknown_extensions_are_ignored(self) -> None:
        assert decode_client_hello(body((0x1A1A, b""), (0xFF01, b"\x00"))).versions == (0x0303,)

    def test_server_name_in_lower_case_beside_another_type(self) -> None:
        names = b"\x07" + sized(b"?") + b"\x00" + sized(b"Gate-Way.Example_1")
        assert decode_client_hello(body((SERVER_NAME, sized(names)))).server_name == "gate-way.example_1"

    def test_server_name_of_another_type_alone(self) -> None:
        assert decode_client_hello(body((SERVER_NAME, sized(b"\x07" + sized(b"?"))))).server_name is None

    def test_server_name_that_is_not_ascii(self) -> None:
        names = b"\x00" + sized("MÜLLER".encode())
        assert decode_client_hello(body((SERVER_NAME, sized(names)))).server_name == r"m\xc3\x9cller"

    @pytest.mark.parametrize("name", [b"gate\x00way", b"a b", b"\n", b"\x7f", b"a" * 256])
    def test_server_name_that_no_host_has(self, name: bytes) -> None:
        with pytest.raises(PeerError) as caught:
            decode_client_hello(body((SERVER_NAME, sized(b"\x00" + sized(name)))))
        assert caught.value.fault is PeerFault.UNRECOGNIZED_NAME

    def test_many_identities_in_order(self) -> None:
        identities = [b"ticket", b"device-1", b"\xff\x00"]
        extension = psk_extension(identities, [bytes(48), bytes(32), bytes(255)])
        assert decode_client_hello(body(extension)).psks == (
            OfferedPsk(b"ticket", 48),
            OfferedPsk(b"device-1", 32),
            OfferedPsk(b"\xff\x00", 255),
        )

    @pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
    def test_malformed(self, content: bytes) -> None:
        assert refusal(record(message(content))).fault is PeerFault.MALFORMED

    def test_a_psk_that_is_not_last(self) -> None:
        hello = body(GOOD_PSK, (0x1A1A, b""))
        assert refusal(record(message(hello))).fault is PeerFault.ILLEGAL_PARAMETER

    def test_every_cut_of_a_real_hello_is_malformed(self) -> None:
        data = vector("openssl-tls13-sni-alpn")
        whole = data[9:]
        length = int.from_bytes(data[6:9])
        assert length == len(whole)
        suites_at = 35 + whole[34]
        compressions_end = suites_at + 2 + int.from_bytes(whole[suites_at : suites_at + 2]) + 2
        for end in range(length):
            if end == compressions_end:
                continue  # a hello that ends there has no extensions and is whole
            with pytest.raises(PeerError) as caught:
                decode_client_hello(whole[:end])
            assert caught.value.fault is PeerFault.MALFORMED


def test_no_detail_repeats_what_the_peer_sent() -> None:
    error = refusal(b"GET /?key=secret HTTP/1.1\r\n")
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x1301, "TLS_AES_128_GCM_SHA256"),
        (0x00A8, "PSK-AES128-GCM-SHA256"),
        (0xC0A8, "PSK-AES128-CCM8"),
        (0xCCAC, "ECDHE-PSK-CHACHA20-POLY1305"),
        (0xD001, "ECDHE-PSK-AES128-GCM-SHA256"),
        (0x0A0A, "0x0A0A"),
        (0x00FE, "0x00FE"),
    ],
)
def test_suite_name(code: int, name: str) -> None:
    assert suite_name(code) == name
