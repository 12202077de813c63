"""Connections that the gateway opens, without a task for each."""

import asyncio
import errno
import os
import select
import socket
from collections.abc import Callable
from typing import Any, Final

from gateway.net.poller import EDGES, Poller
from gateway.net.stream import Stream

__all__ = ["USER_TIMEOUT_MS", "Attempts", "Connecting"]

_CONNECTING: Final = EDGES | select.EPOLLOUT
USER_TIMEOUT_MS: Final = 120_000
"""A peer that acknowledges nothing of what is sent to it for so long is lost; the kernel alone tries for a quarter of an hour."""
_FAILED: Final = select.EPOLLERR | select.EPOLLHUP


class Connecting:
    """One attempt to connect to an address, which is numeric.

    Once connected, `first` is sent and `protocol` gets its stream, behind `done(None)`. A failure is `done(error)`, and the
    protocol hears of nothing. One of both is called, unless it was cancelled; never before the constructor returns, which may raise
    OSError. There is no time-out but the kernel's: who cannot wait cancels.
    """

    __slots__ = ("_address", "_done", "_first", "_poller", "_protocol", "_sock", "is_newcomer")

    def __init__(
        self,
        poller: Poller,
        family: int,
        address: Any,
        protocol: asyncio.Protocol,
        done: "Callable[[Connecting, OSError | None], None]",
        *,
        first: bytes = b"",
    ) -> None:
        self._poller = poller
        self._address = address
        self._protocol = protocol
        self._done = done
        self._first = first
        self.is_newcomer = False  # a device that has proved its key waits for it
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock: socket.SocketType | None = socket.SocketType(family, kind)
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
            self._sock.connect(address)
        except BlockingIOError:
            pass  # it is under way
        except OSError:
            self._sock.close()
            raise
        poller.add(self._sock.fileno(), self, _CONNECTING)

    @property
    def is_over(self) -> bool:
        """Whether it is connected, failed, or cancelled."""
        return self._sock is None

    def cancel(self) -> None:
        """Give up. Nothing happens when it is connected, or has failed."""
        sock, self._sock = self._sock, None
        if sock is not None:
            self._poller.remove(sock.fileno())
            sock.close()

    def ready(self, events: int) -> None:
        """It is connected, or it has failed."""
        sock = self._sock
        assert sock is not None
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & _FAILED else 0
        if error:
            self.cancel()
            self._done(self, OSError(error, os.strerror(error)))
        elif events & select.EPOLLOUT:
            self._sock = None
            stream = Stream(self._poller, sock, self._address[0], self._protocol)
            stream.is_newcomer = False
            self._poller.replace(sock.fileno(), stream)
            self._done(self, None)
            if self._first:
                stream.write(self._first)
            stream.start(is_registered=True)
            stream.ready(events)  # what the service said at once is in the same event, and comes in no other


class Attempts:
    """All attempts to connect to one service, each given up after `timeout_s`, on one timer."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._under_way: dict[Connecting, tuple[float, Callable[[OSError | None], None]]] = {}
        self._is_timed = False

    def begin(
        self,
        poller: Poller,
        address: tuple[int, Any],
        protocol: asyncio.Protocol,
        done: Callable[[OSError | None], None],
        first: bytes = b"",
    ) -> Connecting | None:
        """Try once: `address` is a family and an address of it, the rest is as `Connecting` has it. None: it failed at once."""
        try:
            attempt = Connecting(poller, *address, protocol, self._done, first=first)
        except OSError:
            return None
        self._under_way[attempt] = (poller.loop.time() + self._timeout_s, done)
        if not self._is_timed:
            self._is_timed = True
            poller.loop.call_later(self._timeout_s, self._give_up, poller)
        return attempt

    def _done(self, attempt: Connecting, error: OSError | None) -> None:
        _, done = self._under_way.pop(attempt)
        done(error)

    def _give_up(self, poller: Poller) -> None:
        """End what has taken too long, and come again when the next one will have."""
        self._is_timed = False
        now = poller.loop.time()
        for attempt, (deadline, done) in list(self._under_way.items()):
            if deadline > now and not attempt.is_over:
                self._is_timed = True
                poller.loop.call_later(deadline - now, self._give_up, poller)
                break
            del self._under_way[attempt]
            if not attempt.is_over:
                attempt.cancel()
                done(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
