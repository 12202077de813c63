"""A listening socket: accepts what has come, and makes a stream of each."""

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Final

import structlog

from gateway.net.poller import Poller
from gateway.net.stream import Stream

__all__ = ["Acceptor"]

log = structlog.get_logger()

_ACCEPTS_MAX: Final = 64
"""Accepted on one socket in one turn of the loop: sessions are served in between. More than the poller serves of newcomers in a
turn, so that a flood does not fill the kernel's queue while the poller's own has room."""
_RETRY_S: Final = 1.0


class Acceptor:
    """Accepts on a bound socket, until `close`. Every connection gets a protocol of its own."""

    is_newcomer = False
    """Those that wait are let in beside the sessions, up to a bound: most of a flood is cheap to serve once it gave up."""

    def __init__(
        self, poller: Poller, sock: socket.socket, backlog: int, make: Callable[[], asyncio.Protocol]
    ) -> None:
        self._poller = poller
        self._sock = sock
        self._make = make
        self._family, self._proto = int(sock.family), sock.proto
        sock.setblocking(False)
        # What is accepted inherits it: one system call for all of them.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.listen(backlog)
        self._listen()

    def _listen(self) -> None:
        if self._sock.fileno() >= 0:
            self._poller.add(self._sock.fileno(), self, select.EPOLLIN)

    def close(self) -> None:
        """Accept nothing more. What waits in the backlog is reset when no other process has the socket open."""
        self._poller.unregister(self._sock.fileno())
        self._sock.close()

    def ready(self, events: int) -> None:  # noqa: ARG002 - whatever it is, accept tells
        """Somebody has connected."""
        if self._poller.is_behind:
            return  # the kernel keeps them, and tells again
        for _ in range(_ACCEPTS_MAX):
            try:
                # As `socket.accept` does, without the wrapper that it makes of each.
                descriptor, peer = self._sock._accept()  # type: ignore[attr-defined] # noqa: SLF001
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:  # no descriptor, no memory
                self._rest(exc)
                return
            sock = socket.SocketType(self._family, socket.SOCK_STREAM, self._proto, descriptor)
            Stream(self._poller, sock, peer[0] if peer else "", self._make()).start()

    def _rest(self, exc: OSError) -> None:
        """There is no descriptor or memory for one more: those that wait are accepted when there is."""
        log.error("accept_failed", reason=exc.strerror, retry_s=_RETRY_S)
        self._poller.unregister(self._sock.fileno())
        self._poller.loop.call_later(_RETRY_S, self._listen)
