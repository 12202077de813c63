"""Deadlines of many connections on one timer.

Each thing with a deadline is filed once, in the slot of the tick at which it falls due. A deadline that moves later is
only written to the thing itself; when its old slot comes up, it is filed again. So traffic on a session costs an
attribute write, and no connection needs a timer of its own but one whose handshake failed after an identity was looked
up: its alert leaves sooner and more exactly than a tick allows.
"""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["TICK_S", "Deadlines", "Timed"]

TICK_S = 0.25
"""Deadlines are kept to this many seconds, late and never early."""


class Timed(Protocol):
    """A thing with a deadline, in seconds of the loop's clock. `slot` belongs to `Deadlines`."""

    deadline: float
    slot: int


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """The wheel. Times are seconds of any clock that does not go back."""

    def __init__(self, now: float) -> None:
        self._slots: dict[int, set[T]] = {}
        self._next = int(now / TICK_S)

    def add(self, thing: T) -> None:
        """File `thing` under its deadline; it must not be filed already."""
        slot = int(thing.deadline / TICK_S) + 1
        if slot < self._next:  # noqa: PLR1730 - on the path of every connection, where a call of `max` costs more
            slot = self._next
        thing.slot = slot
        things = self._slots.get(slot)
        if things is None:
            self._slots[slot] = {thing}
        else:
            things.add(thing)

    def bring_forward(self, thing: T) -> None:
        """File `thing` again because its deadline is now earlier than where it stands."""
        self.discard(thing)
        self.add(thing)

    def discard(self, thing: T) -> None:
        """Forget `thing`, filed or not."""
        things = self._slots.get(thing.slot)
        if things is not None:
            things.discard(thing)

    def __iter__(self) -> Iterator[T]:
        """Everything that is filed, as of now."""
        return iter([thing for things in self._slots.values() for thing in things])

    def expired(self, now: float) -> Iterator[T]:
        """Things whose deadline has passed; they are no longer filed. Others in their slots are filed again."""
        last = int(now / TICK_S)
        while self._next <= last:
            due = self._slots.pop(self._next, ())
            self._next += 1
            for thing in due:
                if thing.deadline <= now:
                    yield thing
                else:
                    self.add(thing)
