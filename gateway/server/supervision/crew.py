"""The workers of a node: started, told things, and replaced by new ones while devices go on.

Theory of operation of a roll. The new workers are started beside the old ones, on the same sockets. Only when all of them
accept, all old ones stop accepting; and only when all of those have, the first of them ends a session. So a device that
comes back finds a new worker, and is ended at most once. The old ones spread their closes over the drain window.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog

from gateway.errors import ControlError
from gateway.forward.secrets import REVEAL
from gateway.registry.notices import Changed, Published
from gateway.server.control.messages import (
    Alive,
    Collect,
    Configure,
    Drain,
    EndSessions,
    FollowerStatus,
    Message,
    Reconfigure,
    StopAccepting,
    Subscribe,
)
from gateway.server.processes.sockets import ListeningSockets
from gateway.server.supervision.children import Child, HandedChild
from gateway.server.supervision.node import SupervisorSettings
from gateway.server.supervision.siblings import Siblings
from gateway.telemetry.aggregate import Snapshot, retire

__all__ = ["AFTER_DRAIN_S", "Crew"]

log = structlog.get_logger()

AFTER_DRAIN_S: Final = 5.0
"""What a child may take beyond its drain window before it is killed."""
_PUBLISH_TIMEOUT_S: Final = 30.0
"""From a cold page cache, with every live session to look at again."""
_TELL_TIMEOUT_S: Final = 5.0
_READY_POLL_S: Final = 0.05

FromWorker = Callable[[str, Message], Awaitable[Message | None]]
"""A worker, by its name, says something."""


class Crew:
    """All workers. `from_worker` is told what they say, `started` of each new process, `ended` which is gone, and whether by itself."""

    def __init__(
        self,
        sockets: ListeningSockets,
        from_worker: FromWorker,
        started: Callable[[Child], object],
        ended: Callable[[str, bool], object],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._sockets = sockets
        self._from_worker = from_worker
        self._was_started = started
        self._ended = ended
        self._spawn = spawn
        self._settings: SupervisorSettings | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._is_rolling = False
        self._published: Published | None = None
        self._overlay: Changed | None = None
        self.status = FollowerStatus("starting", "the follower is starting", sequence=0, polled_at=0.0)
        """what the follower said last"""
        self.generation = 0
        """of workers: those that were started together"""
        self.workers: list[Child] = []
        """those that accept, or will"""
        self._coming: list[Child] = []
        self.leaving: list[Child] = []
        """those that end their sessions"""
        self.departed: Snapshot = []
        """what those that are gone had counted"""
        self.is_drained = False
        self._is_stopping = False
        self.siblings = Siblings(sockets, lambda: self.workers, lambda: self._is_settled)

    @property
    def everyone(self) -> list[Child]:
        """All that may have sessions."""
        return [*self.workers, *self._coming, *self.leaving]

    def named(self, name: str) -> Child | None:
        """The worker of this name, if it is there."""
        return next((worker for worker in self.everyone if worker.name == name), None)

    # Life

    def start(self, settings: SupervisorSettings, tasks: asyncio.TaskGroup) -> None:
        """Start them all; `tasks` own them."""
        self._settings, self._tasks = settings, tasks
        self.workers = self._make(settings)
        for worker in self.workers:
            tasks.create_task(self._keep(worker))

    async def attend(self, handed: list[HandedChild], tasks: asyncio.TaskGroup) -> None:
        """Look after workers that another image of the supervisor has started."""
        self._tasks = tasks
        for each in handed:
            worker = self._child(each.name, lambda _: Configure(b""))
            await worker.adopt(each)
            self.workers.append(worker)
            tasks.create_task(self._keep(worker))

    async def roll(self, settings: SupervisorSettings, patience_s: float | None) -> bool:
        """Replace all workers. False when the new ones do not accept within `patience_s` seconds: the old ones stay.

        Returns when the old ones have stopped accepting; they go on ending their sessions.
        """
        assert self._tasks is not None
        self.generation += 1
        self._is_rolling = True
        self._coming = self._make(settings)
        for worker in self._coming:
            self._tasks.create_task(self._keep(worker))
        if not await self._are_ready(self._coming, patience_s):
            gone, self._coming = self._coming, []
            self.leaving += gone
            self._is_rolling = False
            await asyncio.gather(*(worker.stop(Drain(0), AFTER_DRAIN_S) for worker in gone))
            return False
        old, self.workers, self._coming = self.workers, self._coming, []
        self._settings = settings
        self.leaving += old
        await asyncio.gather(*(self._tell(worker, StopAccepting()) for worker in old))
        self._is_rolling = False
        self.workers[0].notify(Subscribe())
        order = Drain(settings.drain_s, is_spread=True)
        for worker in old:
            self._spawn(worker.stop(order, settings.drain_s + AFTER_DRAIN_S))
        log.info("workers_rolled", workers=[worker.name for worker in self.workers], drain_s=settings.drain_s)
        return True

    async def reconfigure(self, settings: SupervisorSettings, rebound: set[str]) -> None:
        """Put other settings in force in the workers that there are. Of listeners in `rebound` they get new sockets."""
        self._settings = settings
        self.siblings.dissolve()  # its sockets may be others now
        await asyncio.gather(
            *(
                self._reconfigure(worker, number, settings, rebound)
                for number, worker in enumerate(self.workers)
            )
        )

    async def empty(self, within_s: float) -> None:
        """Accept nothing any more, and end all sessions within so many seconds; the workers stay, for their spools."""
        self.is_drained = True
        await asyncio.gather(*(self._tell(worker, StopAccepting()) for worker in self.everyone))
        for worker in self.everyone:
            worker.notify(EndSessions(within_s))

    async def stop(self, drain_s: float) -> None:
        """End all of them."""
        self._is_stopping = True
        order = Drain(drain_s)
        await asyncio.gather(*(each.stop(order, drain_s + AFTER_DRAIN_S) for each in self.everyone))

    # What they are told

    def published(self, generation: Published) -> None:
        """There is a new generation of the replica."""
        self._published = generation
        if self._overlay is not None and self._overlay.sequence <= generation.sequence:
            self._overlay = None  # else a follower was started again, and its replica lacks all this
        for worker in self.everyone:
            self._spawn(self._publish_to(worker, generation))

    def status_changed(self, status: FollowerStatus) -> None:
        """The follower says how it stands with the registry; workers that have a bound on its age need to know."""
        self.status = status
        if self._settings is not None and self._settings.worker.max_staleness_s:
            self.notify(status)

    def changed(self, change: Changed) -> None:
        """The registry has changed."""
        self.overlay = change
        self.notify(change)

    @property
    def overlay(self) -> Changed | None:
        """What the replica lacks."""
        return self._overlay

    @overlay.setter
    def overlay(self, change: Changed | None) -> None:
        self._overlay = change if change is not None and change.overlay else None

    @property
    def has_replica(self) -> bool:
        """Whether the registry was ever copied to this node."""
        return self._published is not None

    def notify(self, message: Message) -> None:
        """Tell all of them."""
        for worker in self.everyone:
            worker.notify(message)

    async def collect(self) -> None:
        """Ask all of them for their metrics."""
        await asyncio.gather(*(worker.collect(Collect()) for worker in self.everyone))

    @property
    def collected(self) -> list[Snapshot]:
        """The metrics of all of them, and of those that are gone. One that went while others were asked counts once."""
        return [self.departed, *(worker.collected for worker in self.everyone)]

    @property
    def is_alive(self) -> bool:
        """Whether a worker speaks, or there is none that could."""
        return not self.workers or len(self.siblings.silent) < len(self.workers)

    @property
    def _is_settled(self) -> bool:
        return not (self._is_rolling or self.is_drained or self._is_stopping)

    # Inside

    def _make(self, settings: SupervisorSettings) -> list[Child]:
        suffix = f".{self.generation}" if self.generation else ""
        count = settings.worker_count
        return [
            self._child(
                f"worker-{number}{suffix}", functools.partial(self._configure, number, count, settings)
            )
            for number in range(count)
        ]

    def _child(self, name: str, configuration: Callable[[Child], Configure]) -> Child:
        return Child(
            name,
            "gateway.server.processes.worker",
            configuration,
            functools.partial(self._told, name),
            started=self._started,
            ended=functools.partial(self._has_ended, name),
        )

    async def _told(self, name: str, message: Message) -> Message | None:
        if isinstance(message, Alive):
            self.siblings.heard(name)
            return None
        return await self._from_worker(name, message)

    def _has_ended(self, name: str, by_itself: bool) -> None:
        self.siblings.ended(name)
        self._ended(name, by_itself)

    def _configure(self, number: int, count: int, settings: SupervisorSettings, worker: Child) -> Configure:
        """A new process gets the settings that its place has now, and its share of the sockets."""
        if worker in self.workers and self._settings is not None:
            settings = self._settings
        lent = self._sockets.of_worker(number, count)
        worker.lend([descriptor for descriptors in lent.values() for descriptor in descriptors])
        counts = {name: len(descriptors) for name, descriptors in lent.items()}
        return Configure(_for_worker(settings), worker.name, number, count, counts)

    async def _reconfigure(
        self, worker: Child, number: int, settings: SupervisorSettings, rebound: set[str]
    ) -> None:
        lent = self._sockets.of_worker(number, len(self.workers))
        counts = {name: len(lent[name]) for name in lent if name in rebound}
        try:
            worker.lend([descriptor for name in counts for descriptor in lent[name]])
        except ControlError as exc:  # it does not answer either: its successor begins with these settings
            log.error("child_killed", child=worker.name, reason=str(exc))
            worker.kill()
            return
        await self._tell(worker, Reconfigure(_for_worker(settings), counts))

    def _started(self, worker: Child) -> None:
        """A worker begins empty: tell it where the replica is, when there is one."""
        self._was_started(worker)
        if self._published is not None:
            self._spawn(self._publish_to(worker, self._published))
        if not self._is_rolling and not self.is_drained and self.workers and worker is self.workers[0]:
            worker.notify(Subscribe())  # one subscription per node

    async def _publish_to(self, worker: Child, generation: Published) -> None:
        """Let a worker read this generation; from then on it accepts."""
        worker.notify(self.status)
        if self._overlay is not None:  # before it accepts anybody
            worker.notify(self._overlay)
        try:
            await worker.call(generation, _PUBLISH_TIMEOUT_S)
        except ControlError as exc:
            log.warning("worker_not_ready", child=worker.name, reason=str(exc))
            return
        worker.is_ready = True
        self.siblings.is_ready(worker.name)

    async def _are_ready(self, workers: list[Child], patience_s: float | None) -> bool:
        """Wait until all accept. Where no old one does, as on a node without a replica, there is nothing to wait for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not all(worker.is_ready for worker in workers) and any(  # noqa: ASYNC110 - seconds, seldom
                    worker.is_ready for worker in self.workers
                ):
                    await asyncio.sleep(_READY_POLL_S)
                return True
        return False

    async def ask(self, message: Message, timeout_s: float) -> list[tuple[Child, Message]]:
        """What they answer, each of them. Raises ControlError when one that is to stay does not."""
        workers = self.everyone
        answers = await asyncio.gather(
            *(worker.call(message, timeout_s) for worker in workers), return_exceptions=True
        )
        found = []
        for worker, answer in zip(workers, answers, strict=True):
            if not isinstance(answer, BaseException):
                found.append((worker, answer))
            elif worker in self.workers or not isinstance(answer, ControlError):
                raise answer  # of the others some end just now
        return found

    async def _tell(self, worker: Child, message: Message) -> None:
        """Tell one that may be stuck, and wait until it has done it."""
        try:
            await worker.call(message, _TELL_TIMEOUT_S)
        except ControlError as exc:
            if worker.pid is not None:
                log.warning("worker_does_not_answer", child=worker.name, reason=str(exc))

    async def _keep(self, worker: Child) -> None:
        await worker.keep()
        for places in (self.leaving, self.workers):
            if worker in places:
                places.remove(worker)
        self.departed = retire(self.departed, worker.departed)


def _for_worker(settings: SupervisorSettings) -> bytes:
    return settings.worker.model_dump_json(context=REVEAL).encode()
