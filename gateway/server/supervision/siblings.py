"""Workers that die, stop or hang: a live one accepts on their sockets meanwhile, and one that hangs is replaced.

Connections go to the sockets of all workers, also of one that does not accept, and would wait there. So whoever is lost
gets a sibling that accepts on its sockets too, until it is back. Nothing is closed by that: the sockets are the
supervisor's, and both may accept on one at the same time.

A worker says `Alive` out of its event loop, in every tick. What is counted here is turns of our own loop in which nothing
was heard, and not time: when all of us stood still (a container that was paused), nobody is to blame.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from gateway.errors import ControlError
from gateway.server.control.messages import StandDown, StandIn
from gateway.server.processes.sockets import ListeningSockets
from gateway.server.supervision.children import Child

__all__ = ["Siblings"]

log = structlog.get_logger()

_TURN_S: Final = 0.2
_SILENT_TURNS: Final = 4
"""Nothing was heard for 0.8 s, of a worker that speaks every 0.25 s: new devices must not wait for it."""
_HUNG_TURNS: Final = 50
"""Nothing was heard for 10 s: its own devices wait in vain, and are better off with another."""


class Siblings:
    """Watches the workers of a node, in the order of their places.

    Args:
        workers: those that accept, or should.
        is_settled: whether places are as they are to stay; during a roll nobody stands in for anybody anew.

    """

    def __init__(
        self,
        sockets: ListeningSockets,
        workers: Callable[[], Sequence[Child]],
        is_settled: Callable[[], bool],
    ) -> None:
        self._sockets = sockets
        self._workers = workers
        self._is_settled = is_settled
        self._served: set[str] = set()
        """workers that accepted once: before that there is nothing to stand in for"""
        self._unheard: dict[str, int] = {}
        """turns in which nothing was heard, of workers that spoke"""
        self._stand_ins: dict[Child, Child] = {}
        """who is lost, and who accepts for it"""

    @property
    def silent(self) -> list[Child]:
        """Workers that do not speak."""
        return [each for each in self._workers() if self._unheard.get(each.name, 0) >= _SILENT_TURNS]

    def heard(self, name: str) -> None:
        """A worker is alive."""
        self._unheard[name] = 0

    def is_ready(self, name: str) -> None:
        """A worker accepts: who stood in for it need not any more."""
        self._served.add(name)
        self.arrange()

    def ended(self, name: str) -> None:
        """A process is gone."""
        self._unheard.pop(name, None)
        self.arrange()

    async def watch(self) -> None:
        """Look after them until cancelled."""
        while True:
            await asyncio.sleep(_TURN_S)
            for worker in self._workers():
                if worker.name in self._unheard:
                    self._count_turn(worker)
            self.arrange()

    def arrange(self) -> None:
        """Let live workers stand in for those that are lost, and for no others."""
        if not self._is_settled():
            return
        silent, workers = self.silent, self._workers()
        self._served &= {worker.name for worker in workers}
        alive = [worker for worker in workers if worker.is_ready and worker not in silent]
        lost = [worker for worker in workers if worker not in alive and worker.name in self._served]
        for worker, sibling in list(self._stand_ins.items()):
            if worker not in lost or sibling not in alive:
                self._dissolve(worker)
        for worker in lost:
            if alive and worker not in self._stand_ins:
                least_busy = min(alive, key=list(self._stand_ins.values()).count)
                self._stand_in(worker, least_busy)

    def dissolve(self) -> None:
        """Nobody stands in for anybody, until the next `arrange`."""
        for worker in list(self._stand_ins):
            self._dissolve(worker)

    def _count_turn(self, worker: Child) -> None:
        self._unheard[worker.name] += 1
        match self._unheard[worker.name]:
            case turns if turns == _SILENT_TURNS:
                log.warning("worker_silent", child=worker.name, pid=worker.pid)
            case turns if turns == _HUNG_TURNS:
                log.error("child_killed", child=worker.name, reason=f"silent for {_HUNG_TURNS * _TURN_S:g} s")
                worker.kill()

    def _stand_in(self, worker: Child, sibling: Child) -> None:
        workers = self._workers()
        lent = self._sockets.of_worker(workers.index(worker), len(workers))
        counts = {name: len(descriptors) for name, descriptors in lent.items()}
        try:
            sibling.lend([descriptor for descriptors in lent.values() for descriptor in descriptors])
        except ControlError as exc:  # it is stuck as well, which shows in the next turns
            log.warning("worker_does_not_answer", child=sibling.name, reason=str(exc))
            return
        sibling.notify(StandIn(worker.name, counts))
        self._stand_ins[worker] = sibling
        log.info("stands_in", child=sibling.name, of=worker.name)

    def _dissolve(self, worker: Child) -> None:
        sibling = self._stand_ins.pop(worker)
        sibling.notify(StandDown(worker.name))
        log.info("stands_down", child=sibling.name, of=worker.name)
