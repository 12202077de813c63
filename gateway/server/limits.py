"""How many connections and handshakes a worker lets in. Decided before anything is known of the identity.

Limits are per node; a worker enforces its share, rounded up.
"""

from gateway.server.settings import LimitsSettings

__all__ = ["ConnectionLimits"]


class ConnectionLimits:
    """Counts of what is open in this worker. Every `admit` that said yes is followed by one `release`."""

    def __init__(self, settings: LimitsSettings, workers: int) -> None:
        self._workers = workers
        self._connections = 0
        self._handshakes = 0
        self._by_address: dict[str, int] = {}
        self.change(settings)

    def change(self, settings: LimitsSettings) -> None:
        """Put other bounds in force. What is open stays open."""
        workers = self._workers
        self._connections_max = -(-settings.connections // workers)
        self._per_address_max = -(-settings.connections_per_address // workers)
        self._handshakes_max = -(-settings.handshakes_in_flight // workers)

    def admit(self, address: str) -> bool:
        """Count a new connection from `address`, or say no."""
        of_address = self._by_address.get(address, 0)
        if self._connections >= self._connections_max or of_address >= self._per_address_max:
            return False
        self._connections += 1
        self._by_address[address] = of_address + 1
        return True

    def release(self, address: str) -> None:
        """A connection that was admitted is gone."""
        self._connections -= 1
        of_address = self._by_address[address] - 1
        if of_address:
            self._by_address[address] = of_address
        else:
            del self._by_address[address]

    def begin_handshake(self) -> bool:
        """Count a handshake whose ClientHello is complete, or say no."""
        if self._handshakes >= self._handshakes_max:
            return False
        self._handshakes += 1
        return True

    def end_handshake(self) -> None:
        """A handshake that was begun is over, either way."""
        self._handshakes -= 1
