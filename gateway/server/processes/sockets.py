"""The listening sockets of a node: bound by the supervisor, lent to workers, handed to the next image of the program.

Each listener has at least as many sockets as there are workers, on one address (SO_REUSEPORT spreads connections over
them). A socket is not closed while its listener is there, also when workers become fewer: connections may wait in it,
and closing it would reset them. So a worker accepts on each socket whose place, modulo the workers, is its own.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from gateway.errors import ConfigurationError
from gateway.net.connector import USER_TIMEOUT_MS
from gateway.server.settings import Address, ListenerSettings

__all__ = ["HandedListener", "ListeningSockets", "bind_admin", "lock_folder"]

BACKLOG: Final = 4096
"""Connections that the kernel completes and keeps while the worker is busy (bounded by net.core.somaxconn)."""
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A device that lost power is found after two minutes, as with the user time-out that counts while something waits to be sent
to it. Inherited by accepted sockets."""


class HandedListener(msgspec.Struct, frozen=True):
    """The sockets of one listener, as one image of the program hands them to the next."""

    name: str
    bind: str
    descriptors: list[int]


@dataclass(slots=True)
class _Bound:
    bind: Address
    """as it is configured: port 0 stays 0"""
    socks: list[socket.socket]


class ListeningSockets:
    """The sockets of all listeners. Every method that binds raises ConfigurationError and changes nothing then."""

    def __init__(self) -> None:
        self._bound: dict[str, _Bound] = {}

    @classmethod
    def handed(cls, listeners: Iterable[HandedListener]) -> Self:
        """Those that an image of the program before has bound."""
        sockets = cls()
        for each in listeners:
            socks = [socket.socket(fileno=descriptor) for descriptor in each.descriptors]
            sockets._bound[each.name] = _Bound(Address.parse(each.bind), socks)
        return sockets

    def hand_over(self) -> list[HandedListener]:
        """For `handed`."""
        return [
            HandedListener(name, str(bound.bind), [sock.fileno() for sock in bound.socks])
            for name, bound in self._bound.items()
        ]

    def bind(self, listeners: Iterable[ListenerSettings], count: int) -> "SocketChange":
        """Bind what is new, `count` sockets or more for each listener. `SocketChange.apply` puts them in force."""
        bound: dict[str, _Bound] = {}
        fresh: list[socket.socket] = []
        try:
            for listener in listeners:
                there = self._bound.get(listener.name)
                if there is None or there.bind != listener.bind:
                    socks = _bind_all(f"listeners.{listener.name}.bind", listener.bind, count)
                    fresh += socks
                else:
                    more = _bind_more(there, count - len(there.socks))
                    fresh += more
                    socks = [*there.socks, *more]
                bound[listener.name] = _Bound(listener.bind, socks)
        except BaseException:
            _close_all(fresh)
            raise
        return SocketChange(self, bound, fresh)

    def of_worker(self, number: int, workers: int) -> dict[str, list[int]]:
        """The descriptors on which one of so many workers accepts, for each listener."""
        return {
            name: [sock.fileno() for sock in bound.socks[number::workers]]
            for name, bound in self._bound.items()
        }

    @property
    def addresses(self) -> dict[str, str]:
        """Where each listener really listens."""
        return {name: str(Address(*bound.socks[0].getsockname()[:2])) for name, bound in self._bound.items()}

    def close(self) -> None:
        """Close all of them: connections are refused from then on, unless a worker still holds some."""
        for bound in self._bound.values():
            _close_all(bound.socks)
        self._bound.clear()


class SocketChange:
    """Sockets that are bound and not in force yet."""

    def __init__(
        self, sockets: ListeningSockets, bound: dict[str, _Bound], fresh: list[socket.socket]
    ) -> None:
        self._sockets = sockets
        self._before = sockets._bound  # noqa: SLF001 - our own
        self._bound = bound
        self._fresh = fresh

    def apply(self) -> set[str]:
        """Put them in force; the names of the listeners whose sockets are others now. Then `finish` or `undo` it."""
        self._before, self._sockets._bound = self._sockets._bound, self._bound  # noqa: SLF001 - our own
        before = {name: bound.socks[0] for name, bound in self._before.items()}
        return {name for name, bound in self._bound.items() if before.get(name) is not bound.socks[0]}

    def finish(self) -> None:
        """Close the sockets of listeners that are gone. Workers have let go of them."""
        kept = {id(sock) for bound in self._bound.values() for sock in bound.socks}
        for bound in self._before.values():
            _close_all([sock for sock in bound.socks if id(sock) not in kept])

    def undo(self) -> None:
        """Everything as it was."""
        self._sockets._bound = self._before  # noqa: SLF001 - our own
        _close_all(self._fresh)


def bind_admin(address: Address) -> socket.socket:
    """A listening socket for the admin endpoint. Raises ConfigurationError."""
    try:
        sock = _bound(address, share=False)
        sock.listen(128)
    except OSError as exc:
        raise ConfigurationError(
            f"admin.bind: cannot listen on {address}: {exc.strerror or exc}: choose another address or stop what uses it"
        ) from exc
    return sock


@contextlib.contextmanager
def lock_folder(data_dir: Path, handed: int | None) -> Iterator[int]:
    """Make `data_dir` ours: one gateway uses it at a time. `handed` is the lock of the image of the program before."""
    if handed is not None:
        try:
            yield handed
        finally:
            os.close(handed)
        return
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigurationError(
            f"node.data_dir: cannot write to {data_dir}: {exc.strerror}: make it writable for this user"
        ) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError as exc:
        raise ConfigurationError(
            f"node.data_dir: another gateway uses {data_dir}: stop it, or give this one a data_dir of its own"
        ) from exc
    finally:
        os.close(lock)


def _bind_all(key: str, address: Address, count: int) -> list[socket.socket]:
    """`count` sockets on one address, each with a share of the connections that come in."""
    socks: list[socket.socket] = []
    try:
        # A foreign process that shares the port by SO_REUSEPORT would get a part of the devices: look without it first.
        _bound(address, share=False).close()
        for _ in range(count):
            socks.append(_listening_socket(address))
            if address.port == 0:
                address = Address(address.host, socks[0].getsockname()[1])
    except OSError as exc:
        _close_all(socks)
        raise ConfigurationError(
            f"{key}: cannot listen on {address}: {exc.strerror or exc}: choose another address or stop what uses it"
        ) from exc
    return socks


def _bind_more(there: _Bound, count: int) -> list[socket.socket]:
    """So many more on an address that is ours already."""
    address = Address(there.bind.host, there.socks[0].getsockname()[1])
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            socks.append(_listening_socket(address))  # noqa: PERF401 - those before it are closed when one fails
    except OSError as exc:
        _close_all(socks)
        raise ConfigurationError(f"cannot listen on {address} once more: {exc.strerror or exc}") from exc
    return socks


def _bound(address: Address, *, share: bool) -> socket.socket:
    family, kind, protocol, _, target = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)
    except OSError:
        sock.close()
        raise
    return sock


def _listening_socket(address: Address) -> socket.socket:
    sock = _bound(address, share=True)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (*_KEEP_ALIVE, (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _close_all(socks: Iterable[socket.socket]) -> None:
    for sock in socks:
        sock.close()
