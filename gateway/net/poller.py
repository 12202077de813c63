"""One epoll for many sockets, under one registration with the event loop.

Theory of operation
-------------------
A worker's event loop waits for this epoll as for a single file. When it has events, `_ready` hands each to what stands
behind its descriptor, and then does what was put off meanwhile: further reads of those with more to read, and the ends of
connections. So nothing that a connection calls comes back to it before it returns.
Newcomers, whose handshake is not done, stand in a queue of their own, of which each turn serves a few: whatever a flood of them
costs, sessions are served first.

Streams are registered once, edge-triggered: no call says that they read, pause, or go on, and closing their descriptor
ends the registration. The price is the duty to read until the socket is empty (see `Stream`). An event may be late, of a
descriptor's former owner, or of nothing at all: it is a hint to try, never a fact.
"""

import asyncio
import select
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["EDGES", "Pollable", "Poller"]

EDGES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
"""What every stream is registered for; room to write is asked for while something waits to be written."""
_EVENTS_MAX: Final = 256
"""Taken from the kernel at once; the rest waits for the next turn of the loop."""
_NEWCOMERS_MAX: Final = 32
"""Events of connections in their handshake that a turn serves, 5 ms of work; sessions do not wait for more of them."""
_NEWCOMERS_WAITING_MAX: Final = 4_096
"""As many as the kernel's queue of connections holds."""


class Pollable(Protocol):
    """What stands behind a descriptor."""

    is_newcomer: bool
    """Whether it has to wait, under load, for those that are not."""

    def ready(self, events: int) -> None:
        """The kernel has seen something happen. Must not raise."""


class Poller:
    """All sockets of a worker. `loop` may be any event loop that has `add_reader`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._pollables: dict[int, Pollable] = {}
        self._put_off: list[Callable[[], None]] = []
        self._newcomers: deque[tuple[Pollable, int]] = deque()
        self._is_turning = False
        self._is_scheduled = False
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

    @property
    def is_behind(self) -> bool:
        """Whether newcomers wait in such numbers that no more should be let in just now."""
        return len(self._newcomers) >= _NEWCOMERS_WAITING_MAX

    def put_off(self, what: Callable[[], None]) -> None:
        """Run `what` after whatever runs now. It must not raise."""
        self._put_off.append(what)
        if not self._is_turning:
            self._is_turning = True
            self._schedule()

    def _ready(self) -> None:
        self._is_turning = True
        pollables = self._pollables
        for descriptor, events in self._epoll.poll(0, _EVENTS_MAX):
            pollable = pollables.get(descriptor)
            if pollable is None:
                continue
            if pollable.is_newcomer:
                self._newcomers.append((pollable, events))
            else:
                pollable.ready(events)
        self._turn()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_soon(self._scheduled)

    def _scheduled(self) -> None:
        self._is_scheduled = False
        self._is_turning = True
        self._turn()

    def _turn(self) -> None:
        """Serve some newcomers, and do what was put off; the rest comes in the next turn, so that nobody waits for long."""
        newcomers = self._newcomers
        for _ in range(_NEWCOMERS_MAX):
            if not newcomers:
                break
            pollable, events = newcomers.popleft()
            pollable.ready(events)
        if self._put_off:
            now, self._put_off = self._put_off, []
            for what in now:
                what()
        self._is_turning = bool(self._put_off or newcomers)
        if self._is_turning:
            self._schedule()
