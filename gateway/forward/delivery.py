"""From the sessions of one route to its backend.

Theory of operation. Sessions submit messages, one task delivers them. While a batch is with the backend, what is
submitted collects and becomes the next batch: under load batches grow by themselves, and without load a message
waits for nobody. One batch is out at a time, so messages arrive in the order in which they were submitted, and
answers are given in that order too. Every submitted message is answered exactly once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import BackendError, BackendRefused, BackendUnavailable
from gateway.forward.backends import Sink
from gateway.forward.message import Message
from gateway.wire.framing import Reason

__all__ = ["Answer", "Attempt", "DirectDelivery"]

Answer = Callable[[Reason | None], None]
"""Called once per message: None when it is safe, else why it is not. Must not raise."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One batch, for metrics and the log. `error` is None when the backend confirmed it."""

    messages: int
    duration_s: float
    error: BackendError | None


class DirectDelivery:
    """Delivers without a spool: `ok` is the backend's word.

    The owner awaits `open`, runs `run` in one task of its own, and awaits `aclose`. Submitting is not bounded here:
    the owner reads `pending` and lets each session have only so many unanswered messages.

    `batch_messages_max` bounds the time the event loop encodes at a stretch (2 us each), `batch_bytes_max` (of
    payload; a single larger message still goes) what is held twice while it is written.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        on_attempt: Callable[[Attempt], None] = lambda _attempt: None,
        batch_messages_max: int = 500,
        batch_bytes_max: int = 1 << 20,
    ) -> None:
        self._sink = sink
        self._on_attempt = on_attempt
        self._batch_messages_max = batch_messages_max
        self._batch_bytes_max = batch_bytes_max
        self._waiting: deque[tuple[Message, Answer]] = deque()
        self._in_flight: list[tuple[Message, Answer]] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._running = False
        self._ended = asyncio.Event()

    @property
    def pending(self) -> int:
        """Messages that were submitted and not answered yet."""
        return len(self._waiting) + len(self._in_flight)

    def submit(self, message: Message, done: Answer) -> None:
        """Take a message; after `aclose` has begun it is refused as `stopping`. `done` is never called from within."""
        if self._closing:
            asyncio.get_running_loop().call_soon(done, Reason.STOPPING)
            return
        self._waiting.append((message, done))
        self._wake.set()

    async def open(self) -> None:
        """Open the sink. Raises BackendUnavailable; messages can be submitted all the same, the sink tries again."""
        await self._sink.open()

    async def run(self) -> None:
        """Deliver until `aclose`. When cancelled, what is pending is answered `stopping`; the batch that is out may
        have reached the backend.
        """
        self._running = True
        try:
            while self._waiting or not self._closing:
                if self._waiting:
                    await self._deliver_next()
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self._closing = True
            self._answer_in_flight(Reason.STOPPING)
            self._in_flight = list(self._waiting)
            self._waiting.clear()
            self._answer_in_flight(Reason.STOPPING)
            self._ended.set()

    async def aclose(self) -> None:
        """Take no more, deliver what is pending, close the sink.

        Cancelling it (a drain deadline) leaves the sink open and `run` running: cancel that next.
        """
        self._closing = True
        self._wake.set()
        if self._running or self._waiting:
            await self._ended.wait()
        await self._sink.close()

    async def _deliver_next(self) -> None:
        self._in_flight = self._take_batch()
        started = time.monotonic()
        error: BackendError | None = None
        reason: Reason | None = None
        try:
            await self._sink.deliver([message for message, _ in self._in_flight])
        except BackendUnavailable as exc:
            error, reason = exc, Reason.UNAVAILABLE
        except BackendRefused as exc:
            error, reason = exc, Reason.REFUSED
        self._on_attempt(Attempt(len(self._in_flight), time.monotonic() - started, error))
        self._answer_in_flight(reason)

    def _take_batch(self) -> list[tuple[Message, Answer]]:
        waiting = self._waiting
        batch = [waiting.popleft()]
        room = self._batch_bytes_max - len(batch[0][0].payload)
        while waiting and len(batch) < self._batch_messages_max:
            room -= len(waiting[0][0].payload)
            if room < 0:
                break
            batch.append(waiting.popleft())
        return batch

    def _answer_in_flight(self, reason: Reason | None) -> None:
        batch, self._in_flight = self._in_flight, []
        for _, done in batch:
            done(reason)
