"""The spooled delivery of one route in one process.

Theory of operation. The process writes to one spool of its own, and adopts those that have no owner: of a worker that was
killed, or of one that is not started again because the number of workers changed. An adopted spool is delivered by a
deliverer of its own and removed when nothing is left in it. Sessions live in one process, so each session's messages are
in one spool, and order within a session is the order in that spool. All deliverers share the route's sink in turns.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final

import structlog

from gateway.errors import SpoolError
from gateway.forward.backends import Sink
from gateway.forward.delivery import WINDOW_MESSAGES_MAX, Attempt
from gateway.forward.framed import Answer
from gateway.forward.message import Message
from gateway.forward.outbox.deliverer import Deliverer
from gateway.forward.outbox.folder import Claim, SpoolFolder
from gateway.forward.outbox.outbox import Outbox, OutboxLimits
from gateway.forward.outbox.store import DeadLetter
from gateway.forward.settings import SpoolSettings
from gateway.forward.window import Sender, Window
from gateway.token_bucket import TokenBucket
from gateway.wire.framing import Reason

__all__ = ["SpooledDelivery"]

log = structlog.get_logger()

SCAN_INTERVAL_S: Final = 0.5
"""How often spools without an owner are looked for."""
DRAIN_S: Final = 2.0
"""How long closing goes on delivering; what is left is on the disk, and the next start goes on."""
WINDOW_BYTES_MAX: Final = 8 << 20
"""What may wait for a commit in each worker, beside WINDOW_MESSAGES_MAX; a commit takes milliseconds."""
UNUSABLE_S: Final = 30.0
"""How long a spool that cannot be opened is left alone; a new one is written to meanwhile."""
RETRY_MESSAGES: Final = 200
"""Dead letters that are put back at a time."""


class SpooledDelivery:
    """A `Delivery` for the sessions of a route. The owner awaits `open`, runs `run` in a task of its own, and awaits
    `aclose`.
    """

    def __init__(
        self,
        sink: Sink,
        folder: Path,
        settings: SpoolSettings,
        *,
        workers: int,
        timeout_s: float,
        on_attempt: Callable[[Attempt], None] = lambda _attempt: None,
        on_commit: Callable[[float], None] = lambda _duration_s: None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._sink = sink
        self._folder = SpoolFolder(folder)
        self._settings = settings
        self._limits = OutboxLimits.of(settings, workers)
        self._timeout_s = timeout_s
        self._on_attempt = on_attempt
        self._on_commit = on_commit
        self._wall = wall
        self._window = Window(WINDOW_MESSAGES_MAX, WINDOW_BYTES_MAX)
        self._turn = asyncio.Lock()
        self._dead_turn = asyncio.Lock()
        self._own: Outbox | None = None
        self._early: list[tuple[Message, Answer]] | None = []
        self._held: list[Sender] = []
        self._unusable: dict[str, float] = {}
        self._unusable_said = TokenBucket(0.1, 3, asyncio.get_running_loop().time())
        self._deliverers: list[Deliverer] = []
        self._tasks: dict[Deliverer, asyncio.Task[None]] = {}
        self._running: asyncio.Task[None] | None = None
        self._closing = False

    # What is in the spools of this process

    @property
    def messages(self) -> int:
        """Messages that are not settled."""
        return sum(each.outbox.messages for each in self._deliverers)

    @property
    def bytes(self) -> int:
        """What the spools hold, as their bounds count it."""
        return sum(each.outbox.weight for each in self._deliverers)

    @property
    def bytes_max(self) -> int:
        """What this process's part of the route may hold."""
        return self._limits.weight_max

    @property
    def dead_count(self) -> int:
        """Dead letters."""
        return sum(each.outbox.dead_count for each in self._deliverers)

    @property
    def damaged_messages(self) -> int:
        """Messages that could not be read again."""
        return sum(each.outbox.damaged_messages for each in self._deliverers)

    @property
    def oldest_s(self) -> float:
        """How long the first message waits, 0 when none does."""
        oldest = [each.outbox.oldest for each in self._deliverers]
        return max((self._wall() - since for since in oldest if since is not None), default=0.0)

    # For sessions

    @property
    def is_full(self) -> bool:
        """Whether sessions are to pause."""
        return self._early is not None or self._window.is_full

    def when_free(self, sender: Sender) -> None:
        """Tell `sender` once, when it need not any more."""
        if self._early is not None:
            self._held.append(sender)
        else:
            self._window.when_free(sender)

    def submit(self, message: Message, done: Answer) -> None:
        """Take a message, and answer when it is on the disk. What comes while the spool is being opened waits."""
        if self._own is not None:
            self._own.submit(message, done)
        elif self._early is not None:
            self._early.append((message, done))
        else:
            asyncio.get_running_loop().call_soon(done, message, Reason.UNAVAILABLE)

    # Life

    async def open(self) -> None:
        """Open a spool and the sink. A sink that is away is no error here: raises BackendUnavailable, and works.

        A spool that cannot be opened is tried again by `run`; until then messages are refused as `unavailable`.
        """
        await self._open_own()
        await self._sink.open()

    async def run(self) -> None:
        """Deliver, and adopt spools without an owner, until cancelled or closed."""
        self._running = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            while not self._closing:
                if self._own is None:
                    await self._open_own()
                else:
                    await self._adopt()
                for deliverer in self._deliverers:
                    if deliverer not in self._tasks:
                        self._tasks[deliverer] = tasks.create_task(deliverer.run())
                await asyncio.sleep(SCAN_INTERVAL_S)

    async def aclose(self) -> None:
        """Commit what was submitted and answer it, deliver for a moment what can be, and let go of the spools.

        What is left is delivered by the next owner. Cancelling it is safe too: nothing that was acknowledged is lost.
        """
        self._closing = True
        if self._own is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._own.flush()
                    while self.messages and not any(  # noqa: ASYNC110 - two seconds at most, once in a life
                        each.is_failing for each in self._deliverers
                    ):
                        await asyncio.sleep(DRAIN_S / 100)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        for deliverer in self._deliverers:
            await deliverer.outbox.aclose()
        await self._sink.close()

    async def _open_own(self) -> None:
        try:
            claim = await asyncio.to_thread(self._folder.take, self._passed_over())
        except OSError as exc:
            self._say_unusable(exc.strerror)
        else:
            self._own = await self._add(claim)
        early, self._early = self._early, None
        for message, done in early or ():
            self.submit(message, done)
        held, self._held = self._held, []
        for sender in held:
            sender.route_is_free()

    async def _adopt(self) -> None:
        """Take over what others left behind, and remove what is done."""
        for deliverer in [each for each in self._deliverers if each.outbox is not self._own]:
            outbox = deliverer.outbox
            if not outbox.messages and not outbox.dead_count and not outbox.damaged_messages:
                self._deliverers.remove(deliverer)
                task = self._tasks.pop(deliverer)
                task.cancel()
                await asyncio.wait([task])
                await self._remove(outbox)
        try:
            while (claim := await asyncio.to_thread(self._folder.ownerless, self._passed_over())) is not None:
                log.info("spool_adopted", spool=claim.database.name)
                await self._add(claim)
        except OSError as exc:
            self._say_unusable(exc.strerror)

    async def _remove(self, outbox: Outbox) -> None:
        """Close an adopted spool that is empty, and delete it; where the disk lets nobody, leave it for later."""
        try:
            await outbox.aclose(remove=True)
        except OSError as exc:
            self._leave_alone(Path(outbox.name), exc.strerror)
        else:
            log.info("spool_done", spool=outbox.name)

    def _leave_alone(self, database: Path, reason: str | None) -> None:
        self._say_unusable(reason, spool=database.name)
        self._unusable[database.stem] = asyncio.get_running_loop().time() + UNUSABLE_S

    def _say_unusable(self, reason: str | None, **which: str) -> None:
        """A few times, and then once in a while: a full disk shows at every try."""
        if self._unusable_said.admits(asyncio.get_running_loop().time()):
            log.error("spool_unusable", folder=str(self._folder.path), **which, reason=reason)

    def _passed_over(self) -> set[str]:
        """Names of spools that could not be opened, and are left alone for a while."""
        now = asyncio.get_running_loop().time()
        self._unusable = {name: until for name, until in self._unusable.items() if until > now}
        return set(self._unusable)

    async def _add(self, claim: Claim) -> Outbox | None:
        outbox = Outbox(claim, self._settings, self._limits, self._window, on_commit=self._on_commit)
        try:
            await outbox.open()
        except SpoolError as exc:
            self._leave_alone(claim.database, str(exc))
            return None
        self._deliverers.append(
            Deliverer(
                outbox,
                self._sink,
                self._turn,
                on_attempt=self._on_attempt,
                timeout_s=self._timeout_s,
                age_max_s=self._settings.age_max_s,
                wall=self._wall,
            )
        )
        return outbox

    # Dead letters

    async def dead_letters(self, ids: Sequence[str] | None, limit: int) -> list[DeadLetter]:
        """Those with these ids, or all, up to `limit`. Raises SpoolError."""
        found: list[DeadLetter] = []
        for deliverer in self._deliverers:
            if deliverer.outbox.dead_count and len(found) < limit:
                found += await deliverer.outbox.dead_letters(ids, limit - len(found))
        return found

    async def retry(self, ids: Sequence[str] | None) -> int:
        """Deliver these again, or all; how many. Raises SpoolError."""
        return await self._each_dead(ids, Outbox.retry)

    async def discard(self, ids: Sequence[str] | None) -> int:
        """Forget these for good, or all; how many. Raises SpoolError."""
        return await self._each_dead(ids, Outbox.discard)

    async def _each_dead(
        self,
        ids: Sequence[str] | None,
        act: Callable[[Outbox, Sequence[DeadLetter]], Coroutine[None, None, None]],
    ) -> int:
        count = 0
        async with self._dead_turn:  # what one operator takes, another finds gone
            for outbox in [each.outbox for each in self._deliverers]:
                left = outbox.dead_count  # those that come back meanwhile are not taken again
                while left > 0:
                    letters = await outbox.dead_letters(ids, min(RETRY_MESSAGES, left))
                    if not letters:
                        break
                    await act(outbox, letters)
                    left -= len(letters)
                    count += len(letters)
        return count
