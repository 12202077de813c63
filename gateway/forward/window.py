"""How much of one route may wait in memory."""

from collections.abc import Callable
from typing import Final

from gateway.forward.message import Message

__all__ = ["MESSAGE_BYTES", "Window"]

MESSAGE_BYTES: Final = 300
"""What a waiting message takes beside its payload: the objects, and its places in queues (measured with tracemalloc)."""


class Window:
    """Counts what waits, in bytes, and says when senders are to pause and to go on.

    Full at `bytes_max`. Senders pause, but what they have read comes all the same; from twice `bytes_max` nothing more
    fits, and must be refused. Senders go on when half is free again.
    """

    __slots__ = ("_bytes", "_bytes_max", "_paused")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._paused: list[Callable[[], None]] = []

    @property
    def is_full(self) -> bool:
        """Whether senders are to pause."""
        return self._bytes >= self._bytes_max

    def add(self, message: Message) -> bool:
        """Count a message; False when it does not fit, then it is not counted."""
        if self._bytes >= 2 * self._bytes_max:
            return False
        self._bytes += len(message.payload) + MESSAGE_BYTES
        return True

    def remove(self, message: Message) -> None:
        """The message waits no more. May call those that paused."""
        self._bytes -= len(message.payload) + MESSAGE_BYTES
        if self._paused and self._bytes <= self._bytes_max // 2:
            paused, self._paused = self._paused, []
            for resume in paused:
                resume()

    def when_free(self, resume: Callable[[], None]) -> None:
        """Call `resume` once, when half is free: at once if it is."""
        if self._bytes <= self._bytes_max // 2:
            resume()
        else:
            self._paused.append(resume)
