"""From the sessions of one route to its backend.

Theory of operation. Sessions submit messages, one task delivers them. While a batch is with the backend, what is
submitted collects and becomes the next batch: under load batches grow by themselves, and without load a message
waits for nobody. One batch is out at a time, so messages arrive in the order in which they were submitted, and
answers are given in that order too. Every submitted message is answered exactly once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from gateway.errors import BackendRefused, BackendUnavailable
from gateway.forward.backends import Sink
from gateway.forward.framed import Answer
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from gateway.forward.window import Sender, Window
from gateway.wire.framing import Reason

__all__ = [
    "BATCH_BYTES_MAX",
    "BATCH_MESSAGES_MAX",
    "WINDOW_MESSAGES_MAX",
    "Answer",
    "Attempt",
    "DirectDelivery",
    "attempt",
]

log = structlog.get_logger()

BATCH_MESSAGES_MAX: Final = 500
"""Bounds the time that the event loop encodes at a stretch (2 us each)."""
BATCH_BYTES_MAX: Final = 1 << 20
"""Of payload; bounds what is held twice while it is written. A single larger message still goes."""
WINDOW_MESSAGES_MAX: Final = 2 * BATCH_MESSAGES_MAX
"""What a route may have from its sessions in each worker: the batch that is out and the next one. More would only wait."""
WINDOW_BYTES_MAX: Final = 16 << 20
"""The same in bytes, for large messages."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One batch, for metrics and the log. `error` is None when the backend answered for every message."""

    messages: int
    delivered: int
    refused: int
    refusal: str | None
    """why the first of the refused was"""
    duration_s: float
    error: BackendUnavailable | None


async def attempt(sink: Sink, batch: Sequence[Message], timeout_s: float | None) -> tuple[Receipt, Attempt]:
    """Deliver once, and say what became of each message. Backend errors are in the receipt, not raised."""
    started = time.monotonic()
    receipt = await _settle(sink, batch, timeout_s)
    settled = len(batch) if receipt.settled is None else receipt.settled
    refusals = list(receipt.refused.values())
    return receipt, Attempt(
        messages=len(batch),
        delivered=settled - len(refusals),
        refused=len(refusals),
        refusal=refusals[0] if refusals else None,
        duration_s=time.monotonic() - started,
        error=receipt.error,
    )


async def _settle(sink: Sink, batch: Sequence[Message], timeout_s: float | None) -> Receipt:
    try:
        return await _deliver(sink, batch, timeout_s)
    except BackendUnavailable as exc:
        return Receipt(settled=0, error=exc)
    except BackendRefused as exc:
        if len(batch) == 1:
            return Receipt(refused={0: str(exc)})
    # One of them is at fault: the others must not suffer, and their order must not change.
    half = len(batch) // 2
    first = await _settle(sink, batch[:half], timeout_s)
    if first.error is not None:
        return first
    return _join(first, half, await _settle(sink, batch[half:], timeout_s))


async def _deliver(sink: Sink, batch: Sequence[Message], timeout_s: float | None) -> Receipt:
    """Raises BackendUnavailable or BackendRefused, and nothing else: whatever a client library raises, the route goes on."""
    try:
        async with asyncio.timeout(timeout_s):
            return await sink.deliver(batch) or Receipt()
    except (BackendUnavailable, BackendRefused):
        raise
    except TimeoutError as exc:
        raise BackendUnavailable(f"no confirmation within delivery_timeout_s = {timeout_s} s") from exc
    except (
        Exception
    ) as exc:  # the boundary to libraries of others: what they raise is an outage, and no end of the route
        log.error("backend_fault", exc_info=exc)
        raise BackendUnavailable(f"fault in the backend's client: {type(exc).__name__}") from exc


def _join(first: Receipt, length: int, second: Receipt) -> Receipt:
    return Receipt(
        refused={**first.refused, **{length + index: why for index, why in second.refused.items()}},
        replies={**first.replies, **{length + index: reply for index, reply in second.replies.items()}},
        settled=None if second.settled is None else length + second.settled,
        error=second.error,
    )


class DirectDelivery:
    """Delivers without a spool: `ok` is the backend's word.

    The owner awaits `open`, runs `run` in one task of its own, and awaits `aclose`. What waits is bounded by
    WINDOW_MESSAGES_MAX and `window_bytes_max`: `is_full` asks the sessions to pause, and what comes in spite of that is
    refused as `full` from twice the bytes on.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        on_attempt: Callable[[Attempt], None] = lambda _attempt: None,
        timeout_s: float | None = None,
        replies: bool = True,
        batch_messages_max: int = BATCH_MESSAGES_MAX,
        batch_bytes_max: int = BATCH_BYTES_MAX,
        window_bytes_max: int = WINDOW_BYTES_MAX,
    ) -> None:
        self._sink = sink
        self._replies = replies
        self._on_attempt = on_attempt
        self._timeout_s = timeout_s
        self._batch_messages_max = batch_messages_max
        self._batch_bytes_max = batch_bytes_max
        self._window = Window(WINDOW_MESSAGES_MAX, window_bytes_max)
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

    @property
    def is_full(self) -> bool:
        """Whether sessions are to pause."""
        return self._window.is_full

    def when_free(self, sender: Sender) -> None:
        """Tell `sender` once, when it need not any more."""
        self._window.when_free(sender)

    def submit(self, message: Message, done: Answer) -> None:
        """Take a message; after `aclose` has begun it is refused as `stopping`. `done` is never called from within."""
        if self._closing:
            asyncio.get_running_loop().call_soon(done, message, Reason.STOPPING)
        elif not self._window.add(message):
            asyncio.get_running_loop().call_soon(done, message, Reason.FULL)
        else:
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
            self._answer_in_flight(_ALL_STOPPING)
            self._in_flight = list(self._waiting)
            self._waiting.clear()
            self._answer_in_flight(_ALL_STOPPING)
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
        receipt, tried = await attempt(
            self._sink, [message for message, _ in self._in_flight], self._timeout_s
        )
        self._on_attempt(tried)
        self._answer_in_flight(receipt)

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

    def _answer_in_flight(self, receipt: Receipt) -> None:
        batch, self._in_flight = self._in_flight, []
        settled = len(batch) if receipt.settled is None else receipt.settled
        unsettled = Reason.STOPPING if receipt is _ALL_STOPPING else Reason.UNAVAILABLE
        refused, replies = receipt.refused, receipt.replies
        for index, (message, done) in enumerate(batch):
            self._window.remove(message)
            if index >= settled:
                done(message, unsettled)
            elif index in refused:
                done(message, Reason.REFUSED)
            elif self._replies and index in replies:
                done(message, None, replies[index])
            else:
                done(message, None)


_ALL_STOPPING: Final = Receipt(settled=0, error=BackendUnavailable("the gateway stops"))
