"""How many connections and handshakes a worker lets in. Decided before anything is known of the identity.

Limits are per node; a worker enforces its share. The kernel spreads connections over the workers by a hash of addresses and
ports, so of N connections a worker gets N / workers only on average: its share has four standard deviations more, and
a fleet that keeps within the limit is not refused by the luck of the draw. The node as a whole may let in so much more.
"""

import math
from typing import Final, Generic, TypeVar

from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.admission.rates import Rates
from gateway.server.networks import NetworkList, network_of

__all__ = ["BURST_S", "REFUSED_NETWORKS", "ConnectionLimits", "share"]

BURST_S: Final = 10.0
"""What may come at once, in seconds of the rate: a site that was cut off comes back in one go."""
REFUSED_NETWORKS: Final = "refused_networks"

_DEVIATIONS: Final = 4.0

H = TypeVar("H")


def share(limit: int, workers: int) -> int:
    """Of a limit of the node, what one of its workers lets in."""
    mean = limit / workers
    return min(limit, math.ceil(mean + _DEVIATIONS * math.sqrt(mean * (1 - 1 / workers))))


class ConnectionLimits(Generic[H]):
    """Counts of what is open in this worker. Every `admit` that said yes is followed by one `release`.

    `files_max`: connections that the process has descriptors for. `H` is what a handshake in flight is known by.
    """

    def __init__(self, settings: LimitsSettings, workers: int, files_max: int | None = None) -> None:
        self._workers = workers
        self._connections = 0
        self._by_address: dict[str, int] = {}
        self._by_network: dict[str, int] = {}
        self._handshakes: dict[H, None] = {}
        self.change(settings, files_max)

    def change(self, settings: LimitsSettings, files_max: int | None = None) -> None:
        """Put other bounds in force. What is open stays open; rates begin anew."""
        workers = self._workers
        connections_max = share(settings.connections, workers)
        self.connections_max = connections_max if files_max is None else min(connections_max, files_max)
        self._per_address_max = share(settings.connections_per_address, workers)
        self._per_network_max = share(settings.connections_per_network, workers)
        self._handshakes_max = share(settings.handshakes_in_flight, workers)
        self._address_rates = _rates(settings.connections_per_address_per_s, workers)
        self._network_rates = _rates(settings.connections_per_network_per_s, workers)
        self._refused = NetworkList(settings.refused_networks)
        self._has_refused = bool(settings.refused_networks)  # asked for every connection
        self._exempt = NetworkList(settings.exempt_networks)
        self._has_exempt = bool(settings.exempt_networks)

    def admit(self, address: str, now: float) -> str:  # noqa: PLR0911 - one for each limit
        """Count a new connection from `address` and return "", or the setting that keeps it out."""
        if self._has_refused and address in self._refused:
            return REFUSED_NETWORKS
        if self._connections >= self.connections_max:
            return "connections"
        network = network_of(address)
        of_address = self._by_address.get(address, 0)
        of_network = self._by_network.get(network, 0)
        if not (self._has_exempt and address in self._exempt):
            if of_address >= self._per_address_max:
                return "connections_per_address"
            if of_network >= self._per_network_max:
                return "connections_per_network"
            if self._address_rates is not None and not self._address_rates.take(address, now):
                return "connections_per_address_per_s"
            if self._network_rates is not None and not self._network_rates.take(network, now):
                return "connections_per_network_per_s"
        self._connections += 1
        self._by_address[address] = of_address + 1
        self._by_network[network] = of_network + 1
        return ""

    def admit_balancer(self) -> bool:
        """Count a connection that has yet to say whose it is; `release_balancer` follows."""
        if self._connections >= self.connections_max:
            return False
        self._connections += 1
        return True

    def release_balancer(self) -> None:
        """It has said so, or is gone."""
        self._connections -= 1

    def release(self, address: str) -> None:
        """A connection that was admitted is gone."""
        self._connections -= 1
        for counts, key in ((self._by_address, address), (self._by_network, network_of(address))):
            if counts[key] > 1:
                counts[key] -= 1
            else:
                del counts[key]

    def begin_handshake(self, handshake: H) -> H | None:
        """Count a handshake whose ClientHello is complete; one too many is returned, the oldest, for the caller to end."""
        self._handshakes[handshake] = None
        return next(iter(self._handshakes)) if len(self._handshakes) > self._handshakes_max else None

    def end_handshake(self, handshake: H) -> None:
        """A handshake that was begun is over, either way."""
        del self._handshakes[handshake]


def _rates(per_s: float, workers: int) -> Rates | None:
    return Rates(per_s / workers, share(max(1, round(per_s * BURST_S)), workers)) if per_s else None
