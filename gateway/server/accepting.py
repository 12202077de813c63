"""Where a worker accepts: its sockets of each listener, and the servers on them."""

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from gateway.net.acceptor import Acceptor
from gateway.net.poller import Poller
from gateway.net.stream import StreamProtocol
from gateway.server.listener import Listener
from gateway.server.sockets import BACKLOG

__all__ = ["Accepting", "receive_descriptors"]

_DESCRIPTORS_MAX: Final = 253
"""What one message of the kernel carries at most (SCM_MAX_FD)."""


class Accepting:
    """Accepts from `start` to `stop`. `factory` makes what makes the protocol of one connection."""

    def __init__(self, poller: Poller, factory: Callable[[Listener], Callable[[], StreamProtocol]]) -> None:
        self._poller = poller
        self._factory = factory
        self._socks: dict[str, list[socket.socket]] = {}
        self._acceptors: dict[str, list[Acceptor]] = {}
        self._is_stopped = False
        self.is_accepting = False

    def take(self, sockets: Mapping[str, list[socket.socket]]) -> None:
        """Take sockets for listeners; those that it had for them are let go."""
        for name, socks in sockets.items():
            self.drop(name)
            self._socks[name] = socks

    def drop(self, name: str) -> None:
        """Let go of the sockets of a listener."""
        for acceptor in self._acceptors.pop(name, []):
            acceptor.close()
        for sock in self._socks.pop(name, []):
            sock.close()

    def start(self, listeners: Iterable[Listener]) -> None:
        """Accept on all sockets of these listeners; on those where it accepts already nothing changes."""
        if self._is_stopped:
            return
        self.is_accepting = True
        for listener in listeners:
            if listener.name not in self._acceptors:
                self._acceptors[listener.name] = [
                    Acceptor(self._poller, sock, BACKLOG, self._factory(listener))
                    for sock in self._socks.get(listener.name, [])
                ]

    def stop(self) -> None:
        """Accept no more, for good."""
        self.is_accepting, self._is_stopped = False, True
        for name in list(self._socks):
            self.drop(name)


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
