"""PROXY protocol v2 headers, byte by byte after doc/proxy-protocol.txt section 2.2."""

import pytest

from gateway.wire.proxy_protocol import SIGNATURE, encode_proxy_header

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
