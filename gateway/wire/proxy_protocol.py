"""The PROXY protocol, which tells a service who stands behind a connection (haproxy, doc/proxy-protocol.txt).

Inbound both versions are read (`ProxyHeaderScanner`): a balancer in front of a listener says where a device comes from.
Outbound a header of version 2 tells a service who its device is (`encode_proxy_header`).
"""

import ipaddress
import re
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from gateway.errors import PeerError, PeerFault

__all__ = [
    "SIGNATURE",
    "V1_BYTES_MAX",
    "ProxyHeader",
    "ProxyHeaderScanner",
    "encode_proxy_header",
]

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
"""How a header of version 2 begins (section 2.2)."""
V1_BYTES_MAX: Final = 107
"""The longest line of version 1, its line break included (section 2.1)."""

_V1_START: Final = b"PROXY "
_V1_LINE: Final = re.compile(
    rb"PROXY (TCP[46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})"
)
_FIXED: Final = struct.Struct("!12sBBH")
_VERSION_2: Final = 0x20
_LOCAL: Final = 0x0
_PROXY: Final = 0x1
_UNSPEC: Final = 0x00
_TCP_OVER_IPV4: Final = 0x11
_TCP_OVER_IPV6: Final = 0x21
_UNIX_STREAM: Final = 0x31
_WITHOUT_ADDRESSES: Final = frozenset({_UNSPEC, _UNIX_STREAM})
_IP_BYTES: Final = {_TCP_OVER_IPV4: 4, _TCP_OVER_IPV6: 16}
_LENGTH_MAX: Final = 0xFFFF
_PORT_MAX: Final = 0xFFFF

SocketAddress = tuple[str, int]


class ProxyHeader(NamedTuple):
    """Who stands behind a connection, as (address, port).

    Both None: the balancer speaks for itself (a health check), or does not know; its own address is then the peer's.
    """

    source: SocketAddress | None
    destination: SocketAddress | None


class ProxyHeaderScanner:
    """Takes the bytes of one connection until its header is complete."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.rest = b""
        """What came behind the header."""

    def feed(self, piece: bytes) -> ProxyHeader | None:
        """The header once it is complete; feed nothing more then. Holds 64 KiB at most, beside one piece.

        Raises:
            PeerError: PROXY_HEADER, as soon as the bytes cannot be a header of either version.

        """
        data = self._data
        data += piece
        if data.startswith(SIGNATURE):
            header, end = _decode_v2(data)
        elif data.startswith(_V1_START):
            header, end = _decode_v1(data)
        elif SIGNATURE.startswith(data) or _V1_START.startswith(data):
            return None
        else:
            raise _malformed("it begins with neither `PROXY ` nor the signature of version 2")
        if header is not None:
            self.rest = bytes(data[end:])
        return header


def _malformed(what: str) -> PeerError:
    return PeerError(PeerFault.PROXY_HEADER, f"no valid PROXY header: {what}")


def _decode_v1(data: bytearray) -> tuple[ProxyHeader | None, int]:
    """Version 1 (section 2.1): one line of text. The header, None while it is not complete, and where it ends."""
    end = data.find(b"\r\n", 0, V1_BYTES_MAX)
    if end < 0:
        if len(data) >= V1_BYTES_MAX:
            raise _malformed(f"no line break within {V1_BYTES_MAX} bytes")
        return None, 0
    line = bytes(data[:end])
    end += 2
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        return ProxyHeader(None, None), end
    match = _V1_LINE.fullmatch(line)
    if match is None:
        raise _malformed("its line is not PROXY TCP4|TCP6 and two addresses and two ports")
    family, *fields = (field.decode("ascii") for field in match.groups())
    try:
        kind = ipaddress.IPv4Address if family == "TCP4" else ipaddress.IPv6Address
        first, last = kind(fields[0]), kind(fields[1])
    except ValueError:
        raise _malformed(f"an address is not one of {family}") from None
    ports = int(fields[2]), int(fields[3])
    if max(ports) > _PORT_MAX:
        raise _malformed("a port is above 65535")
    return ProxyHeader((_text(first), ports[0]), (_text(last), ports[1])), end


def _decode_v2(data: bytearray) -> tuple[ProxyHeader | None, int]:
    """Version 2 (section 2.2): addresses as bytes, then vectors, which are skipped."""
    if len(data) < _FIXED.size:
        return None, 0
    _, version_command, family, length = _FIXED.unpack_from(data)
    command = version_command & 0x0F
    if version_command & 0xF0 != _VERSION_2 or command not in {_LOCAL, _PROXY}:
        raise _malformed(f"version and command {version_command:#04x} are unknown")
    if command == _PROXY and family not in _IP_BYTES and family not in _WITHOUT_ADDRESSES:
        raise _malformed(f"family and transport {family:#04x} are no TCP connection")
    ip_bytes = _IP_BYTES.get(family, 0) if command == _PROXY else 0
    if length < 2 * ip_bytes + 4 * bool(ip_bytes):
        raise _malformed(f"{length} bytes hold no addresses")
    end = _FIXED.size + length
    if len(data) < end:
        return None, 0
    if not ip_bytes:
        return ProxyHeader(None, None), end
    at = _FIXED.size
    source, destination = data[at : at + ip_bytes], data[at + ip_bytes : at + 2 * ip_bytes]
    ports = struct.unpack_from("!HH", data, at + 2 * ip_bytes)
    return ProxyHeader(
        (_text(ipaddress.ip_address(bytes(source))), ports[0]),
        (_text(ipaddress.ip_address(bytes(destination))), ports[1]),
    ), end


def _text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """As sockets write it; an IPv4 address that was mapped into IPv6 is one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


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
