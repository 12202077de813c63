"""Where a worker accepts: its sockets of each listener, and the servers on them."""

import asyncio
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from gateway.net.acceptor import Acceptor
from gateway.net.poller import Poller
from gateway.server.admission.listener import Listener
from gateway.server.processes.sockets import BACKLOG

__all__ = ["Accepting", "receive_descriptors"]

_DESCRIPTORS_MAX: Final = 253
"""What one message of the kernel carries at most (SCM_MAX_FD)."""


_Place = tuple[str, str]
"""A listener, and the worker whose sockets of it these are: "" for our own."""


class Accepting:
    """Accepts from `start` to `stop`. `factory` makes what makes the protocol of one connection."""

    def __init__(self, poller: Poller, factory: Callable[[Listener], Callable[[], asyncio.Protocol]]) -> None:
        self._poller = poller
        self._factory = factory
        self._socks: dict[_Place, list[socket.socket]] = {}
        self._acceptors: dict[_Place, list[Acceptor]] = {}
        self._is_stopped = False
        self.is_accepting = False

    def take(self, sockets: Mapping[str, list[socket.socket]], of_worker: str = "") -> None:
        """Take sockets for listeners, our own or those of another worker; those that it had there are let go."""
        for name, socks in sockets.items():
            self._drop((name, of_worker))
            self._socks[name, of_worker] = socks
        if self._is_stopped:
            self._drop_all()

    def drop(self, listener: str) -> None:
        """Let go of the sockets of a listener."""
        for place in [place for place in self._socks if place[0] == listener]:
            self._drop(place)

    def let_go(self, of_worker: str) -> None:
        """Let go of the sockets of another worker."""
        for place in [place for place in self._socks if place[1] == of_worker]:
            self._drop(place)

    def start(self, listeners: Iterable[Listener]) -> None:
        """Accept on all sockets of these listeners; on those where it accepts already nothing changes."""
        if self._is_stopped:
            return
        self.is_accepting = True
        known = {listener.name: listener for listener in listeners}
        for place in self._socks:
            listener = known.get(place[0])
            if listener is not None and place not in self._acceptors:
                self._acceptors[place] = [
                    Acceptor(self._poller, sock, BACKLOG, self._factory(listener))
                    for sock in self._socks[place]
                ]

    def stop(self) -> None:
        """Accept no more, for good."""
        self.is_accepting, self._is_stopped = False, True
        self._drop_all()

    def _drop(self, place: "_Place") -> None:
        for acceptor in self._acceptors.pop(place, []):
            acceptor.close()
        for sock in self._socks.pop(place, []):
            sock.close()

    def _drop_all(self) -> None:
        for place in list(self._socks):
            self._drop(place)


def receive_descriptors(channel: socket.socket, counts: Mapping[str, int]) -> dict[str, list[socket.socket]]:
    """The listening sockets that the supervisor sent over `channel`, so many for each listener, in this order."""
    wanted = sum(counts.values())
    descriptors: list[int] = []
    while len(descriptors) < wanted:
        _, some, _, _ = socket.recv_fds(channel, 1, _DESCRIPTORS_MAX)
        if not some:
            raise ConnectionError("the supervisor is gone")
        descriptors += some
    numbers = iter(descriptors)
    return {
        name: [socket.socket(fileno=next(numbers)) for _ in range(count)] for name, count in counts.items()
    }
