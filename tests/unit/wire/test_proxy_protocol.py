"""PROXY protocol headers, byte by byte after doc/proxy-protocol.txt sections 2.1 and 2.2."""

import pytest

from gateway.errors import PeerError, PeerFault
from gateway.wire.proxy_protocol import (
    SIGNATURE,
    V1_BYTES_MAX,
    ProxyHeader,
    ProxyHeaderScanner,
    encode_proxy_header,
)

SIGNATURE_HEX = "0d0a0d0a000d0a515549540a"


def test_tcp_over_ipv4() -> None:
    header = encode_proxy_header(("192.0.2.1", 40000), ("198.51.100.7", 8883), {0xE4: b"default", 0xE6: b""})
    assert header.hex() == (
        SIGNATURE_HEX + "21" + "11" + f"{12 + 10 + 3:04x}" + "c0000201" + "c6336407" + "9c40" + "22b3"
        "e4" + "0007" + b"default".hex() + "e6" + "0000"
    )
    assert SIGNATURE.hex() == SIGNATURE_HEX


def test_tcp_over_ipv6() -> None:
    header = encode_proxy_header(("2001:db8::1%eth0", 1), ("2001:db8::2", 2), {})
    assert header.hex() == (
        SIGNATURE_HEX
        + "21"
        + "21"
        + "0024"
        + "20010db8000000000000000000000001"
        + "20010db8000000000000000000000002"
        "0001" + "0002"
    )


def test_two_families_are_written_as_ipv6() -> None:
    header = encode_proxy_header(("192.0.2.1", 1), ("::1", 2), {})
    assert header[13] == 0x21
    assert header[16:32].hex() == "00000000000000000000ffffc0000201"


def test_unknown_addresses() -> None:
    header = encode_proxy_header(None, None, {0xE5: b"d"})
    assert header.hex() == SIGNATURE_HEX + "21" + "00" + "0004" + "e5000164"


def test_too_long() -> None:
    with pytest.raises(ValueError, match="at most 65535 bytes"):
        encode_proxy_header(None, None, {0xE5: bytes(0xFFFF)})


SOURCE, DESTINATION = ("192.0.2.1", 40000), ("198.51.100.7", 8883)


def scan(data: bytes) -> tuple[ProxyHeader | None, bytes]:
    scanner = ProxyHeaderScanner()
    return scanner.feed(data), scanner.rest


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 40000 8883", ProxyHeader(SOURCE, DESTINATION)),
        (b"PROXY TCP6 2001:DB8::1 ::1 0 65535", ProxyHeader(("2001:db8::1", 0), ("::1", 65535))),
        (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2", ProxyHeader(("192.0.2.1", 1), ("::1", 2))),
        (b"PROXY UNKNOWN", ProxyHeader(None, None)),
        (
            b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535",
            ProxyHeader(None, None),
        ),  # the rest is ignored
    ],
)
def test_version_1(line: bytes, expected: ProxyHeader) -> None:
    assert scan(line + b"\r\n\x16\x03\x01") == (expected, b"\x16\x03\x01")


def test_the_longest_line_of_version_1() -> None:
    address = b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    line = b"PROXY TCP6 %s %s 65535 65535\r\n" % (address, address)
    assert len(line) == 104
    assert scan(line)[0] is not None
    unknown = b"PROXY UNKNOWN " + address + b" " + address + b" 65535 65535\r\n"
    assert len(unknown) == V1_BYTES_MAX
    assert scan(unknown)[0] == ProxyHeader(None, None)
    with pytest.raises(PeerError, match="within 107 bytes"):
        scan(b"PROXY UNKNOWN" + b" " * 100 + b"\r\n")


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY TCP4 192.0.2.1 198.51.100.7 40000",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 40000 65536",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 040000 8883",
        b"PROXY TCP4 192.0.2.1  198.51.100.7 40000 8883",
        b"PROXY TCP4 192.0.2.256 198.51.100.7 40000 8883",
        b"PROXY TCP4 ::1 ::1 1 2",
        b"PROXY TCP6 192.0.2.1 192.0.2.1 1 2",
        b"PROXY UDP4 192.0.2.1 198.51.100.7 1 2",
        b"PROXY UNKNOWNS",
        b"PROXY tcp4 192.0.2.1 198.51.100.7 1 2",
        b"PROXY ",
    ],
)
def test_version_1_malformed(line: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        scan(line + b"\r\n")
    assert caught.value.fault is PeerFault.PROXY_HEADER
    assert caught.value.fault.alert is None


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x00\x00", b"GET / HTTP/1.1\r\n", b"PROXY\t", b"\r\n\r\n\x01"]
)
def test_what_is_no_header_is_told_at_once(data: bytes) -> None:
    with pytest.raises(PeerError, match="begins with neither"):
        scan(data)


def test_version_2_skips_vectors() -> None:
    header = encode_proxy_header(SOURCE, DESTINATION, {0xE4: b"default", 0x20: bytes(300)})
    assert scan(header + b"behind") == (ProxyHeader(SOURCE, DESTINATION), b"behind")


@pytest.mark.parametrize(
    "hexadecimal",
    [
        "2011000c" + "00" * 12,  # LOCAL: a health check of the balancer; the addresses are not looked at
        "20000000",
        "21000003040000",  # UNSPEC, and a vector
        "213100d8" + "00" * 216,  # unix sockets
    ],
)  # fmt: skip
def test_version_2_without_addresses(hexadecimal: str) -> None:
    assert scan(SIGNATURE + bytes.fromhex(hexadecimal)) == (ProxyHeader(None, None), b"")


@pytest.mark.parametrize(
    "hexadecimal",
    [
        "1111000c" + "00" * 12,  # version 1 in the binary form
        "2211000c" + "00" * 12,  # a command that there is not
        "2112000c" + "00" * 12,  # datagrams
        "2141000c" + "00" * 12,  # a family that there is not
        "2111000b" + "00" * 11,  # too short for its addresses
        "21210023" + "00" * 35,
    ],
)  # fmt: skip
def test_version_2_malformed(hexadecimal: str) -> None:
    with pytest.raises(PeerError) as caught:
        scan(SIGNATURE + bytes.fromhex(hexadecimal))
    assert caught.value.fault is PeerFault.PROXY_HEADER
