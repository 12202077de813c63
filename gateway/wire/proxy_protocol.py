"""The PROXY protocol version 2, which tells a service who stands behind a connection (haproxy, doc/proxy-protocol.txt)."""

import ipaddress
import struct
from collections.abc import Mapping
from typing import Final

__all__ = ["SIGNATURE", "encode_proxy_header"]

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
"""How a header begins (section 2.2)."""

_VERSION_2: Final = 0x20
_PROXY: Final = 0x1
_UNSPEC: Final = 0x00
_TCP_OVER_IPV4: Final = 0x11
_TCP_OVER_IPV6: Final = 0x21
_LENGTH_MAX: Final = 0xFFFF


def encode_proxy_header(
    source: tuple[str, int] | None, destination: tuple[str, int] | None, tlvs: Mapping[int, bytes]
) -> bytes:
    """The header for a TCP connection from `source` to `destination` (address, port), with type-length-value vectors.

    Addresses of two families are written as IPv6, an IPv4 one mapped; without addresses the family is unspecified.
    Raises ValueError when it would be longer than the format allows (64 KiB).
    """
    family, addresses = _encode_addresses(source, destination)
    vectors = b"".join(struct.pack("!BH", kind, len(value)) + value for kind, value in tlvs.items())
    body = addresses + vectors
    if len(body) > _LENGTH_MAX:
        raise ValueError(f"a PROXY header holds at most {_LENGTH_MAX} bytes")
    return SIGNATURE + struct.pack("!BBH", _VERSION_2 | _PROXY, family, len(body)) + body


def _encode_addresses(
    source: tuple[str, int] | None, destination: tuple[str, int] | None
) -> tuple[int, bytes]:
    if source is None or destination is None:
        return _UNSPEC, b""
    first, last = (ipaddress.ip_address(host.partition("%")[0]) for host, _ in (source, destination))
    if first.version == last.version == 4:  # noqa: PLR2004 -- the version of IP
        family = _TCP_OVER_IPV4
    else:
        family = _TCP_OVER_IPV6
        first, last = _as_ipv6(first), _as_ipv6(last)
    return family, first.packed + last.packed + struct.pack("!HH", source[1], destination[1])


def _as_ipv6(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv6Address:
    if isinstance(address, ipaddress.IPv6Address):
        return address
    return ipaddress.IPv6Address(f"::ffff:{address}")
