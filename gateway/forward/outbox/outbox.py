"""A spool and what of it is in memory: from `submit` to the acknowledgement, and from there to the deliverer.

Theory of operation. All state lives on the event loop; the store is touched by one thread, one job at a time, in the
order of the jobs, and what a job found comes back in that order too.

    submit -> waiting --commit--> the file, and (while there is room and no gap) `ready` --next_groups--> out --settled--> deleted
                                        '------------- read, after a gap --------^

A commit takes everything that waits, up to a bound, and is followed by the next at once when a full group waits, else
after COMMIT_INTERVAL_S. So a message that comes alone is committed alone and at once, and under load commits are few
and large. Deletions ride along with the next commit; without one they wait DELETE_DELAY_S.

What waits for the deliverer is kept in memory as far as it may (`queue`), and the rest is read from the file when it is its
turn. So memory is bounded, however long the backend is away, and nothing is read while it is well.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from gateway.errors import SpoolDamaged, SpoolError, SpoolFull
from gateway.forward.delivery import BATCH_BYTES_MAX, BATCH_MESSAGES_MAX
from gateway.forward.framed import Answer
from gateway.forward.message import Message
from gateway.forward.outbox.contents import Contents
from gateway.forward.outbox.folder import Claim
from gateway.forward.outbox.queue import DeliveryQueue
from gateway.forward.outbox.store import DeadLetter, Group, SpoolStore, Summary
from gateway.forward.settings import SpoolSettings
from gateway.forward.window import Window
from gateway.wire.framing import Reason

__all__ = ["COMMIT_INTERVAL_S", "Outbox", "OutboxLimits"]

log = structlog.get_logger()

COMMIT_INTERVAL_S: Final = 0.004
"""Between the beginnings of two commits that are not full. A commit costs some 150 us of CPU whatever is in it."""
DELETE_DELAY_S: Final = 0.05
"""How long a delivered message may stay in the file: what a kill within this time sends once more."""
READY_WEIGHT_MAX: Final = 16 << 20
"""What is kept in memory for the deliverer."""
FULL_RETRY_S: Final = 1.0
"""After a full disk, until deletions are tried again."""
LOG_INTERVAL_S: Final = 10.0
SHRINK_INTERVAL_S: Final = 5.0
CLOSE_S: Final = 2.0
"""What closing waits for a disk that does not take the last deletions: they are sent again by the next owner."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """One process's part of the route's spool settings. Weights are bytes of payload and 256 for each message."""

    weight_max: int
    device_weight_max: int
    ready_weight_max: int = READY_WEIGHT_MAX
    group_messages_max: int = BATCH_MESSAGES_MAX
    group_bytes_max: int = BATCH_BYTES_MAX
    commit_interval_s: float = COMMIT_INTERVAL_S

    @classmethod
    def of(cls, settings: SpoolSettings, workers: int) -> "OutboxLimits":
        """The part of one of `workers` processes."""
        weight_max = settings.bytes_max // workers
        return cls(weight_max, int(weight_max * settings.device_share))


class Outbox:
    """One spool that this process owns. `window` counts what is not committed yet; it is the route's."""

    def __init__(
        self,
        claim: Claim,
        settings: SpoolSettings,
        limits: OutboxLimits,
        window: Window,
        *,
        on_commit: Callable[[float], None] = lambda _duration_s: None,
    ) -> None:
        self._claim = claim
        self._limits = limits
        self._window = window
        self._on_commit = on_commit
        self._store = SpoolStore(claim.database, settings.sync)
        self._thread: ThreadPoolExecutor | None = None
        self._loop = asyncio.get_running_loop()

        self._waiting: deque[tuple[Message, Answer]] = deque()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._busy = False
        self._committed_at = 0.0
        self._delete_through = 0
        self._dead: list[DeadLetter] = []
        self._silent_until = 0.0
        self._shrink_at = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

        self._queue = DeliveryQueue(limits.ready_weight_max)
        self._arrived = asyncio.Event()
        self._contents = Contents(limits.weight_max, limits.device_weight_max)

    # What is in it

    @property
    def name(self) -> str:
        """The name of the file."""
        return self._claim.database.name

    @property
    def messages(self) -> int:
        """Committed, or about to be, and not settled."""
        return self._contents.messages

    @property
    def weight(self) -> int:
        """Of its messages and its dead letters."""
        return self._contents.weight

    @property
    def dead_count(self) -> int:
        """How many dead letters it keeps."""
        return self._contents.dead_letters

    @property
    def oldest(self) -> float | None:
        """Since when the first message that is not settled waits, Unix seconds."""
        return self._queue.since

    @property
    def damaged_messages(self) -> int:
        """How many could not be read again."""
        return self._store.damaged_messages

    # Life

    async def open(self) -> None:
        """Open the file. A damaged one is put aside, and what can be read of it is kept. Raises SpoolError."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        try:
            try:
                summary = await self._in_thread(self._store.open)
            except SpoolDamaged as exc:
                summary = await self._recover(exc)
        except BaseException:
            self._thread.shutdown(wait=False)
            self._claim.give_up()
            raise
        self._contents.reset(summary)
        self._queue.is_behind = summary.messages > 0
        if summary.messages or summary.dead_letters:
            log.info(
                "spool_found",
                spool=self.name,
                messages=summary.messages,
                bytes=self.weight,
                dead_letters=summary.dead_letters,
            )

    async def flush(self) -> None:
        """Wait until everything that was submitted is answered, and everything that was settled is deleted."""
        while self._waiting or self._busy or self._delete_through or self._dead:
            self._commit_soon(0)
            self._idle.clear()
            await self._idle.wait()

    async def aclose(self, *, remove: bool = False) -> None:
        """Refuse what comes from now on, commit what came, close the file; `remove` it if it must be empty."""
        self._closing = True
        if self._thread is None:
            return
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self.flush()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            thread, self._thread = self._thread, None
            try:
                await self._loop.run_in_executor(thread, self._close, remove)
            finally:
                thread.shutdown(wait=False)

    def _close(self, remove: bool) -> None:
        self._store.close()
        if remove:
            self._claim.remove()
        else:
            self._claim.release()

    # In

    def submit(self, message: Message, done: Answer) -> None:
        """Take a message, and answer when it is on the disk, or why it is not."""
        if self._closing:
            self._loop.call_soon(done, message, Reason.STOPPING)
        elif not self._contents.has_room(message) or not self._window.add(message):
            self._loop.call_soon(done, message, Reason.FULL)
        else:
            self._contents.add(message)
            self._waiting.append((message, done))
            if not self._busy and len(self._waiting) in (1, self._limits.group_messages_max):
                self._commit_next()

    def _commit_next(self) -> None:
        """Arrange the next commit: soon when a full group waits or the last one is long ago."""
        due = self._committed_at + self._limits.commit_interval_s
        wait_s = due - self._loop.time()
        full = len(self._waiting) >= self._limits.group_messages_max
        self._commit_soon(0 if full else max(0.0, wait_s))

    def _commit_soon(self, wait_s: float) -> None:
        if self._busy:
            return
        if self._timer is not None:
            self._timer.cancel()
        # Not at once: the other messages of this read come first.
        self._timer = (
            self._loop.call_later(wait_s, self._commit) if wait_s else self._loop.call_soon(self._commit)
        )

    def _commit(self) -> None:
        """Give the thread everything that is to be written."""
        self._timer = None
        if self._busy or self._thread is None:
            return
        taken = self._take()
        group = Group([message for message, _ in taken], taken[0][0].received_at) if taken else None
        delete_through, self._delete_through = self._delete_through, 0
        dead, self._dead = self._dead, []
        if group is None and not delete_through and not dead:
            self._idle.set()
            return
        self._busy = True
        self._committed_at = self._loop.time()
        job = self._loop.run_in_executor(self._thread, self._store.commit, group, delete_through, dead)
        job.add_done_callback(lambda done: self._committed(done, taken, group, delete_through, dead))

    def _take(self) -> list[tuple[Message, Answer]]:
        waiting = self._waiting
        limits = self._limits
        taken: list[tuple[Message, Answer]] = []
        room = limits.group_bytes_max
        while waiting and len(taken) < limits.group_messages_max:
            room -= len(waiting[0][0].payload)
            if room < 0 and taken:
                break
            taken.append(waiting.popleft())
        return taken

    def _committed(
        self,
        job: "asyncio.Future[None]",
        taken: list[tuple[Message, Answer]],
        group: Group | None,
        delete_through: int,
        dead: list[DeadLetter],
    ) -> None:
        """The thread is back. Answer, and go on with what has come since."""
        self._busy = False
        self._on_commit(self._loop.time() - self._committed_at)
        reason: Reason | None = None
        wait_s = DELETE_DELAY_S
        if (exc := job.exception()) is not None:
            if group is not None:
                self._contents.remove(group)
            self._delete_through = max(self._delete_through, delete_through)
            self._dead = dead + self._dead
            reason, wait_s = self._commit_failed(exc), FULL_RETRY_S
        elif group is not None:
            self._arrive(group)
        remove = self._window.remove
        for message, done in taken:
            remove(message)
            done(message, reason)
        if self._waiting:
            self._commit_next()
        elif self._delete_through or self._dead:
            self._commit_soon(wait_s)
        else:
            self._idle.set()
            self._shrink_sometimes()

    def _shrink_sometimes(self) -> None:
        """After an outage the file is large, and nothing is in it."""
        now = self._loop.time()
        if not self._contents.messages and now >= self._shrink_at and self._thread is not None:
            self._shrink_at = now + SHRINK_INTERVAL_S
            self._thread.submit(self._store.shrink)

    def _commit_failed(self, exc: BaseException) -> Reason:
        """Begin to put it right; gives what the devices are told."""
        assert self._thread is not None
        if isinstance(exc, SpoolFull):
            self._log_failure("spool_disk_full", exc)
            is_settled = self._contents.messages == len(self._waiting) and not self._contents.dead_letters
            if is_settled and not self.damaged_messages:
                self._thread.submit(self._store.start_over)
            else:
                self._thread.submit(self._store.make_room)
            return Reason.FULL
        if isinstance(exc, SpoolDamaged):
            job = self._loop.run_in_executor(self._thread, self._store.recover, self._queue.loaded_through)
            job.add_done_callback(lambda done: self._recovered(exc, done))
        elif isinstance(exc, SpoolError):
            self._log_failure("spool_failed", exc)
        else:
            log.error("spool_failed", spool=self.name, exc_info=exc)
        return Reason.UNAVAILABLE

    def _log_failure(self, event: str, exc: BaseException) -> None:
        """Once in a while: a full disk refuses every commit."""
        now = self._loop.time()
        if now >= self._silent_until:
            self._silent_until = now + LOG_INTERVAL_S
            log.error(event, spool=self.name, reason=str(exc))

    # Out

    async def next_groups(self) -> list[Group]:
        """Wait for groups to deliver: the next in order, a batch full. They are out until they are settled."""
        while not self._queue:
            if self._queue.is_behind:
                await self._load()
            else:
                self._arrived.clear()
                await self._arrived.wait()
        return self._queue.take()

    def settled(self, group: Group, dead: Sequence[DeadLetter] = ()) -> None:
        """All messages of the first group that is out are delivered, or `dead`."""
        self._queue.settled(group)
        self._contents.remove(group)
        self._contents.add_dead(dead)
        self._delete_through = group.number
        self._dead.extend(dead)
        if not self._busy and self._timer is None:
            self._commit_soon(DELETE_DELAY_S)

    def give_back(self) -> None:
        """What is out will not be delivered by who took it: it is the next again."""
        self._queue.give_back()

    def _arrive(self, group: Group) -> None:
        """A group is in the file."""
        self._queue.arrive(group)
        self._arrived.set()

    async def _load(self) -> None:
        """Read on behind what is in memory. What cannot be read is put aside in the file, and counts no more."""
        try:
            await self._read_on()
        except SpoolError as exc:  # for now, such as by a full disk: all of it is still there
            self._log_failure("spool_unreadable", exc)
            await asyncio.sleep(FULL_RETRY_S)

    async def _read_on(self) -> None:
        damaged = self._store.damaged_messages
        try:
            groups = await self._in_thread(
                self._store.read, self._queue.loaded_through, self._limits.ready_weight_max // 2
            )
        except SpoolDamaged as exc:
            self._recount(await self._recover(exc))
            return
        self._queue.load(groups)
        if lost := self._store.damaged_messages - damaged:
            log.error("spool_messages_damaged", spool=self.name, messages=lost, kept="in the table `damaged`")
            self._recount(await self._in_thread(self._store.summary, self._queue.loaded_through))

    # Dead letters

    async def dead_letters(self, ids: Sequence[str] | None, limit: int) -> list[DeadLetter]:
        """Those with these ids, or all; oldest first. Raises SpoolError."""
        return await self._in_thread(self._store.dead_letters, ids, limit)

    async def retry(self, letters: Sequence[DeadLetter]) -> None:
        """Deliver these again, behind everything else."""
        group = await self._in_thread(self._store.requeue, letters, time.time())
        self._contents.remove_dead(letters)
        self._contents.add_group(group)
        self._arrive(group)

    async def discard(self, letters: Sequence[DeadLetter]) -> None:
        """Forget these for good."""
        await self._in_thread(self._store.discard, letters)
        self._contents.remove_dead(letters)

    # Inside

    async def _recover(self, exc: SpoolDamaged) -> Summary:
        summary, aside = await self._in_thread(self._store.recover, self._queue.loaded_through)
        self._log_recovery(exc, summary, aside)
        return summary

    def _recovered(self, exc: SpoolDamaged, job: "asyncio.Future[tuple[Summary, Path]]") -> None:
        if (failure := job.exception()) is not None:
            self._log_failure("spool_failed", failure)
            return
        summary, aside = job.result()
        self._log_recovery(exc, summary, aside)
        self._recount(summary)

    def _recount(self, behind: Summary) -> None:
        """The file was damaged: what counts is in memory, or behind it in the file."""
        self._contents.reset(behind, self._queue, (message for message, _ in self._waiting))
        self._queue.is_behind = True

    def _log_recovery(self, exc: SpoolDamaged, summary: Summary, aside: Path) -> None:
        log.error(
            "spool_damaged",
            spool=self.name,
            reason=str(exc),
            kept_as=str(aside),
            messages_saved=summary.messages,
        )

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        assert self._thread is not None, "not open"
        return await self._loop.run_in_executor(self._thread, call, *arguments)
