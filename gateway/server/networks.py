"""IP networks: those that a setting lists, and the one that an address counts for."""

import functools
import ipaddress
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["NetworkList", "Networks", "network_of"]

_REMEMBERED_MAX = 4096
"""Addresses whose network, or whose place in a list, is kept: the last ones asked for."""
_V6_NETWORK_BYTES = 8

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as exc:
        raise ValueError(
            f"{text!r} is no network: write it like 10.0.0.0/8 or 2001:db8::/32 ({exc})"
        ) from None


Networks = tuple[Annotated[str, AfterValidator(_network)], ...]
"""Networks in CIDR notation; a bare address is a network of one."""


def _parsed(address: str) -> _Address | None:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


@functools.lru_cache(_REMEMBERED_MAX)
def network_of(address: str) -> str:
    """The network that counts for an address as sockets write it: the /24 in IPv4, the /64 in IPv6."""
    if ":" not in address:
        return address.rpartition(".")[0]
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return parsed.packed[:_V6_NETWORK_BYTES].hex()
    return "" if parsed is None else network_of(str(parsed))


class NetworkList:
    """Networks to look an address up in. False when there are none."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)
        self._has = functools.lru_cache(_REMEMBERED_MAX)(self._look_up)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: str) -> bool:
        return bool(self._networks) and self._has(address)

    def _look_up(self, address: str) -> bool:
        parsed = _parsed(address)
        return parsed is not None and any(parsed in network for network in self._networks)
