"""PROXY headers: any pieces give the same header, what is encoded is decoded, arbitrary bytes raise PeerError alone."""

import ipaddress
from typing import Literal

from hypothesis import given, settings, strategies as st

from gateway.errors import PeerError, PeerFault
from gateway.wire.proxy_protocol import SIGNATURE, ProxyHeader, ProxyHeaderScanner, encode_proxy_header

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

ports = st.integers(0, 0xFFFF)


@st.composite
def addresses(draw: st.DrawFn) -> tuple[tuple[str, int], tuple[str, int]]:
    kind: Literal[4, 6] = draw(st.sampled_from([4, 6]))
    ips = st.ip_addresses(v=kind).filter(lambda ip: getattr(ip, "ipv4_mapped", None) is None)
    first, last = draw(ips), draw(ips)
    return (str(first), draw(ports)), (str(last), draw(ports))


@st.composite
def headers(draw: st.DrawFn) -> tuple[ProxyHeader, bytes]:
    source, destination = draw(addresses())
    if draw(st.booleans()):
        vectors = draw(st.dictionaries(st.integers(0, 255), st.binary(max_size=40), max_size=4))
        return ProxyHeader(source, destination), encode_proxy_header(source, destination, vectors)
    family = f"TCP{ipaddress.ip_address(source[0]).version}"
    line = f"PROXY {family} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n"
    return ProxyHeader(source, destination), line.encode()


@patient
@given(headers(), st.lists(st.integers(1, 20), min_size=1, max_size=8), st.binary(max_size=20))
def test_any_pieces_give_what_was_encoded(
    header: tuple[ProxyHeader, bytes], sizes: list[int], behind: bytes
) -> None:
    expected, data = header
    scanner = ProxyHeaderScanner()
    at, index, found = 0, 0, None
    while found is None:
        size = sizes[index % len(sizes)]
        piece, at, index = data[at : at + size], at + size, index + 1
        found = scanner.feed(piece + behind if at >= len(data) else piece)
        assert (found is not None) == (at >= len(data))
    assert found == expected
    assert scanner.rest == behind


@patient
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", SIGNATURE, SIGNATURE + b"\x21\x11", b"PROXY ", b"PROXY TCP6 "]),
)
def test_arbitrary_bytes_raise_nothing_else_in_any_pieces(data: bytes, start: bytes) -> None:
    whole = _scan([start + data])
    assert whole in {None, PeerFault.PROXY_HEADER} or isinstance(whole, ProxyHeader)
    assert _scan([bytes([byte]) for byte in start + data]) == whole


def _scan(pieces: list[bytes]) -> ProxyHeader | PeerFault | None:
    scanner = ProxyHeaderScanner()
    for piece in pieces:
        try:
            found = scanner.feed(piece)
        except PeerError as error:
            return error.fault
        if found is not None:
            return found
    return None
