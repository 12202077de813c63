"""One epoll for many sockets, under one registration with the event loop.

Theory of operation
-------------------
A worker's event loop waits for this epoll as for a single file. When it has events, `_ready` hands each to what stands
behind its descriptor, and then does what was put off meanwhile: further reads of those with more to read, and the ends of
connections. So nothing that a connection calls comes back to it before it returns.

Streams are registered once, edge-triggered: no call says that they read, pause, or go on, and closing their descriptor
ends the registration. The price is the duty to read until the socket is empty (see `Stream`). An event may be late, of a
descriptor's former owner, or of nothing at all: it is a hint to try, never a fact.
"""

import asyncio
import select
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["EDGES", "Pollable", "Poller"]

EDGES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
"""What every stream is registered for; room to write is asked for while something waits to be written."""
_EVENTS_MAX: Final = 256
"""Taken from the kernel at once; the rest waits for the next turn of the loop."""


class Pollable(Protocol):
    """What stands behind a descriptor."""

    def ready(self, events: int) -> None:
        """The kernel has seen something happen. Must not raise."""


class Poller:
    """All sockets of a worker. `loop` may be any event loop that has `add_reader`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._pollables: dict[int, Pollable] = {}
        self._put_off: list[Callable[[], None]] = []
        self._is_turning = False
        loop.add_reader(self._epoll.fileno(), self._ready)

    def close(self) -> None:
        """Let go of the loop. Nothing that is still registered hears of anything any more."""
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def add(self, descriptor: int, pollable: Pollable, events: int) -> None:
        """Register a descriptor, until `remove`."""
        self._pollables[descriptor] = pollable
        self._epoll.register(descriptor, events)

    def change(self, descriptor: int, events: int) -> None:
        """Register for other events."""
        self._epoll.modify(descriptor, events)

    def replace(self, descriptor: int, pollable: Pollable) -> None:
        """Put another in the place of what stands behind a descriptor."""
        self._pollables[descriptor] = pollable

    def remove(self, descriptor: int) -> None:
        """Forget a descriptor that is closed right after this, which ends its registration with the kernel."""
        self._pollables.pop(descriptor, None)

    def unregister(self, descriptor: int) -> None:
        """Forget a descriptor that stays open, here or in another process."""
        if self._pollables.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def put_off(self, what: Callable[[], None]) -> None:
        """Run `what` after whatever runs now. It must not raise."""
        self._put_off.append(what)
        if not self._is_turning:
            self._is_turning = True
            self.loop.call_soon(self._turn)

    def _ready(self) -> None:
        self._is_turning = True
        pollables = self._pollables
        for descriptor, events in self._epoll.poll(0, _EVENTS_MAX):
            pollable = pollables.get(descriptor)
            if pollable is not None:
                pollable.ready(events)
        self._turn()

    def _turn(self) -> None:
        """Do what was put off; what that puts off comes in the next turn, so that nobody is kept waiting for long."""
        now, self._put_off = self._put_off, []
        for what in now:
            what()
        self._is_turning = bool(self._put_off)
        if self._put_off:
            self.loop.call_soon(self._turn)
