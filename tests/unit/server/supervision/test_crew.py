"""What the supervisor keeps for workers that start."""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

from gateway.registry.notices import Changed, Published
from gateway.server.control.messages import Message
from gateway.server.processes.sockets import ListeningSockets
from gateway.server.supervision.children import Child
from gateway.server.supervision.crew import Crew
from gateway.telemetry.aggregate import Family, Sample, Snapshot, merge


def test_what_a_full_disk_kept_from_the_replica_outlives_the_follower() -> None:
    """A follower that starts again publishes a replica that lacks it; only a newer replica has it."""

    async def scenario() -> list[bool]:
        crew = Crew(ListeningSockets(), _heard, lambda _: None, lambda _name, _by_itself: None, _unexpected)
        overlaid = []
        crew.changed(Changed(8, ((1, 1),), realms=False, committed_at=0.0, overlay={b"revoked": None}))
        overlaid.append(crew.overlay is not None)
        for generation in (Published("/replica/a", 5), Published("/replica/b", 8)):
            crew.published(generation)
            overlaid.append(crew.overlay is not None)
        return overlaid

    assert asyncio.run(scenario()) == [True, True, False]


def test_a_worker_that_goes_while_metrics_are_collected_counts_once() -> None:
    """A counter that went up for one scrape and down again would pass for a restart in Prometheus."""

    class Place:
        """A worker that has counted 5, and ends when it is told to."""

        def __init__(self) -> None:
            self.answers, self.ends = asyncio.Event(), asyncio.Event()
            self.departed: Snapshot = []
            self.collected = [Family("received", "counter", "", (Sample("received_total", (), 5.0),))]

        async def collect(self, _: Message) -> None:
            await self.answers.wait()

        async def keep(self) -> None:
            await self.ends.wait()
            self.departed = self.collected

    async def scenario() -> float:
        crew = Crew(ListeningSockets(), _heard, lambda _: None, lambda _name, _by_itself: None, _unexpected)
        going, staying = Place(), Place()
        crew.workers = cast("list[Child]", [going, staying])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(crew._keep(cast("Child", going)))
            collecting = tasks.create_task(crew.collect())
            going.answers.set()
            await asyncio.sleep(0)
            going.ends.set()
            await asyncio.sleep(0.01)
            assert len(crew.workers) == 1
            staying.answers.set()
            await collecting
        (family,) = merge(crew.collected)
        return family.samples[0].value

    assert asyncio.run(scenario()) == 10


async def _heard(_name: str, _message: Message) -> Message | None:
    return None


def _unexpected(_: Coroutine[Any, Any, None]) -> None:
    raise AssertionError("there are no workers to tell")
