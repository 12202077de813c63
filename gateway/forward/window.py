"""How much of one route may wait in memory."""

from collections import deque
from typing import Final, Protocol

from gateway.forward.message import Message

__all__ = ["MESSAGE_BYTES", "Sender", "Window"]

MESSAGE_BYTES: Final = 300
"""What a waiting message takes beside its payload: the objects, and its places in queues (measured with tracemalloc)."""


class Sender(Protocol):
    """Who has to pause while the route is full."""

    def route_is_free(self) -> None:
        """It may go on. Must not raise."""


class Window:
    """Counts what waits, and says when senders are to pause and to go on.

    Full at `messages_max` or `bytes_max`. Senders pause, but what they have taken comes all the same; from twice
    `bytes_max` nothing more fits, and must be refused. When half is free again senders go on, those first that have paused
    first, until it is full.
    """

    __slots__ = ("_bytes", "_bytes_max", "_messages", "_messages_max", "_paused")

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._messages_max = messages_max
        self._bytes_max = bytes_max
        self._messages = 0
        self._bytes = 0
        self._paused: deque[Sender] = deque()

    @property
    def is_full(self) -> bool:
        """Whether senders are to pause."""
        return self._messages >= self._messages_max or self._bytes >= self._bytes_max

    @property
    def _is_half_free(self) -> bool:
        return self._messages <= self._messages_max // 2 and self._bytes <= self._bytes_max // 2

    def add(self, message: Message) -> bool:
        """Count a message; False when it does not fit, then it is not counted."""
        if self._bytes >= 2 * self._bytes_max:
            return False
        self._messages += 1
        self._bytes += len(message.payload) + MESSAGE_BYTES
        return True

    def remove(self, message: Message) -> None:
        """The message waits no more. May call those that paused."""
        self._messages -= 1
        self._bytes -= len(message.payload) + MESSAGE_BYTES
        if self._paused and self._is_half_free:
            while self._paused and not self.is_full:
                self._paused.popleft().route_is_free()

    def when_free(self, sender: Sender) -> None:
        """Tell `sender` once, when half is free: at once if it is."""
        if self._is_half_free:
            sender.route_is_free()
        else:
            self._paused.append(sender)
