"""From one outbox to the backend, again and again until everything is there."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from gateway.errors import BackendUnavailable
from gateway.forward.backends import Sink
from gateway.forward.delivery import Attempt, attempt
from gateway.forward.message import Message
from gateway.forward.outbox.outbox import Outbox
from gateway.forward.outbox.store import DeadLetter, Group
from gateway.forward.receipt import Receipt

__all__ = ["BackOff", "Deliverer"]

log = structlog.get_logger()

EXPIRED: Final = "expired"
"""The reason of a dead letter that waited too long."""


@dataclass(slots=True)
class BackOff:
    """How long to wait after a failure: twice as long after each, with jitter, so that workers and nodes spread."""

    first_s: float = 0.1
    max_s: float = 10.0
    retry_after_max_s: float = 300.0
    """a backend that asks for more is asked again all the same"""
    failures: int = 0

    def next(self, error: BackendUnavailable) -> float:
        """Seconds to wait after one more failure."""
        longest = min(self.max_s, self.first_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        asked = min(error.retry_after_s or 0.0, self.retry_after_max_s)
        return max(longest * random.uniform(0.5, 1.0), asked)  # noqa: S311 - spreads load, guards nothing


class Deliverer:
    """Delivers one outbox, in order, one batch at a time. `turn` is held while the sink has a batch: several outboxes
    of a route share one sink.
    """

    def __init__(
        self,
        outbox: Outbox,
        sink: Sink,
        turn: asyncio.Lock,
        *,
        on_attempt: Callable[[Attempt], None],
        timeout_s: float,
        age_max_s: float,
        back_off: BackOff | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.outbox: Final = outbox
        self._sink = sink
        self._turn = turn
        self._on_attempt = on_attempt
        self._timeout_s = timeout_s
        self._age_max_s = age_max_s
        self._back_off = back_off or BackOff()
        self._wall = wall

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._back_off.failures > 0

    async def run(self) -> None:
        """Deliver until cancelled. What is out then goes back to the outbox; the backend may have got some of it."""
        try:
            while True:
                await self._deliver(deque(await self.outbox.next_groups()))
        finally:
            self.outbox.give_back()

    async def _deliver(self, groups: deque[Group]) -> None:
        """Until all of these are settled. The first group may be settled in parts: so many of its messages."""
        settled = 0
        dead: list[DeadLetter] = []
        while groups:
            now = self._wall()
            if groups[0].since + self._age_max_s < now:
                dead += [DeadLetter(message, EXPIRED, now) for message in groups[0].messages[settled:]]
                self._bury(groups.popleft(), dead)
                settled, dead = 0, []
                continue
            batch = [message for group in groups for message in group.messages][settled:]
            receipt, tried = await self._attempt(batch)
            dead += [
                DeadLetter(batch[index], receipt.refused[index], now) for index in sorted(receipt.refused)
            ]
            settled += len(batch) if receipt.settled is None else receipt.settled
            while groups and settled >= len(groups[0].messages):
                group = groups.popleft()
                settled -= len(group.messages)
                dead = self._bury(group, dead)
            if tried.delivered or receipt.error is None:
                self._back_off.failures = 0
            if receipt.error is not None:
                await asyncio.sleep(self._back_off.next(receipt.error))

    def _bury(self, group: Group, dead: list[DeadLetter]) -> list[DeadLetter]:
        """A whole group is settled; gives the dead letters that belong to the groups after it."""
        if not dead:
            self.outbox.settled(group)
            return dead
        own = {(message.session, message.sequence) for message in group.messages}
        its = [each for each in dead if (each.message.session, each.message.sequence) in own]
        self.outbox.settled(group, its)
        return dead[len(its) :]

    async def _attempt(self, batch: list[Message]) -> tuple[Receipt, Attempt]:
        async with self._turn:
            receipt, tried = await attempt(self._sink, batch, self._timeout_s)
        self._on_attempt(tried)
        return receipt, tried
