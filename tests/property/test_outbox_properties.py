"""Whatever happens to backend and process: what was acknowledged arrives or is a dead letter, and in order."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from gateway.errors import BackendRefused, BackendUnavailable
from gateway.forward.message import Message
from gateway.forward.outbox import SpooledDelivery
from gateway.forward.outbox.deliverer import BackOff
from gateway.forward.outbox.outbox import OutboxLimits
from gateway.forward.receipt import Receipt
from gateway.forward.settings import SpoolSettings
from gateway.wire.framing import Reason

POISON = 7
"""Every so manieth message is refused for good."""

Mood = str
moods = st.sampled_from(["well", "away", "half", "unknown culprit", "lost confirmation"])
lives = st.lists(st.lists(st.tuples(st.integers(0, 40), moods), max_size=4), min_size=1, max_size=4)


class World:
    """The one backend of all lives."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.accepted: set[int] = set()
        self.mood: Mood = "well"
        self.last = 0


class Sink:
    """A life's connection to the backend; after `cut` it hears and says nothing more."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.cut = False

    async def open(self) -> None:
        pass

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        await asyncio.sleep(0)
        world = self._world
        if self.cut or world.mood == "away":
            raise BackendUnavailable("away")
        numbers = [message.sequence for message in batch]
        poison = {index: "poison" for index, number in enumerate(numbers) if number % POISON == 0}
        if world.mood == "unknown culprit" and poison:
            if len(batch) == 1:
                world.mood = "well"
            raise BackendRefused("one of them")
        if world.mood == "half":
            world.mood = "well"
            half = len(batch) // 2
            world.arrived += [number for number in numbers[:half] if number % POISON]
            return Receipt(
                refused={index: why for index, why in poison.items() if index < half},
                settled=half,
                error=BackendUnavailable("cut"),
            )
        world.arrived += [number for number in numbers if number % POISON]
        if world.mood == "lost confirmation":
            world.mood = "well"
            raise BackendUnavailable("no answer")
        return Receipt(refused=poison)

    async def close(self) -> None:
        pass


async def live(
    world: World, folder: Path, steps: list[tuple[int, Mood]], memory: int, *, to_the_end: bool
) -> set[str]:
    """One life; ends as a kill does, with the files as they are at that moment, in a folder beside the old one."""
    sink = Sink(world)
    delivery = SpooledDelivery(sink, folder, SpoolSettings(sync="normal"), workers=1, timeout_s=5)
    delivery._limits = OutboxLimits(
        1 << 30, 1 << 30, ready_weight_max=memory, group_messages_max=5, commit_interval_s=0
    )
    accepted: set[int] = set()

    def answered(message: Message, reason: Reason | None, _reply: bytes | None = None) -> None:
        assert reason is None
        accepted.add(message.sequence)

    dead: set[str] = set()
    await delivery.open()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(delivery.run())
        for count, mood in steps:
            world.mood = mood
            for _ in range(count):
                world.last += 1
                message = Message("r", "d", "d", None, "s", world.last, time.time(), b"")
                delivery.submit(message, answered)
            await asyncio.sleep(0.002)
        if to_the_end:
            world.mood = "well"
            while delivery.messages:  # noqa: ASYNC110 - polled within the deadline of the test
                await asyncio.sleep(0.001)
            own = delivery._own
            assert own is not None
            await own.flush()
            dead = {letter.id for letter in await delivery.dead_letters(None, 10_000)}
            assert len(dead) == delivery.dead_count
        else:
            own = delivery._own
            while own is not None and own._busy:  # noqa: ASYNC110 - a copy between two writes is what a kill leaves
                await asyncio.sleep(0)
        world.accepted |= accepted
        sink.cut = True
        shutil.copytree(folder, folder.with_name(folder.name + "+"))
        await delivery.aclose()
    return dead


@settings(max_examples=25, deadline=None)
@given(lives, st.sampled_from([600, 1 << 20]))
def test_nothing_acknowledged_is_lost(plan: list[list[tuple[int, Mood]]], memory: int) -> None:
    async def test(folder: Path) -> None:
        world = World()
        for steps in plan:
            await live(world, folder, steps, memory, to_the_end=False)
            folder = folder.with_name(folder.name + "+")
        dead = await live(world, folder, [], memory, to_the_end=True)
        poisoned = {number for number in world.accepted if number % POISON == 0}
        assert {f"s-{number}" for number in poisoned} <= dead
        assert world.accepted - poisoned <= set(world.arrived)
        first = list(dict.fromkeys(world.arrived))
        assert first == sorted(first)

    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner() as runner,
    ):
        patch.setattr(BackOff, "next", _soon)
        patch.setattr("gateway.forward.outbox.delivery.DRAIN_S", 0.01)
        runner.run(asyncio.wait_for(test(Path(folder) / "spool"), 60))


def _soon(_self: BackOff, _error: BackendUnavailable) -> float:
    return 0.001
