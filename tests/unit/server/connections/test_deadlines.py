"""Deadlines on one timer."""

import dataclasses

import pytest
from hypothesis import given, strategies as st

from gateway.server.connections.deadlines import TICK_S, Deadlines


@dataclasses.dataclass(eq=False)
class Thing:
    deadline: float
    slot: int = 0


def test_a_thing_expires_once_and_never_early() -> None:
    wheel: Deadlines[Thing] = Deadlines(100.0)
    thing = Thing(101.0)
    wheel.add(thing)
    assert list(wheel.expired(101.0 - TICK_S)) == []
    assert list(wheel.expired(101.0 + 2 * TICK_S)) == [thing]
    assert list(wheel.expired(200.0)) == []


def test_a_deadline_that_moved_later_is_filed_again() -> None:
    wheel: Deadlines[Thing] = Deadlines(0.0)
    thing = Thing(1.0)
    wheel.add(thing)
    thing.deadline = 5.0
    assert list(wheel.expired(2.0)) == []
    assert list(wheel) == [thing]
    assert list(wheel.expired(5.0 + 2 * TICK_S)) == [thing]


def test_a_deadline_brought_forward() -> None:
    wheel: Deadlines[Thing] = Deadlines(0.0)
    thing = Thing(3600.0)
    wheel.add(thing)
    thing.deadline = 1.0
    wheel.bring_forward(thing)
    assert list(wheel.expired(1.0 + 2 * TICK_S)) == [thing]


def test_a_discarded_thing_is_gone() -> None:
    wheel: Deadlines[Thing] = Deadlines(0.0)
    thing = Thing(1.0)
    wheel.add(thing)
    wheel.discard(thing)
    wheel.discard(thing)
    assert list(wheel) == []
    assert list(wheel.expired(10.0)) == []


def test_a_deadline_in_the_past_expires_at_the_next_tick() -> None:
    wheel: Deadlines[Thing] = Deadlines(1000.0)
    thing = Thing(3.0)
    wheel.add(thing)
    assert list(wheel.expired(1000.0 + TICK_S)) == [thing]


@given(
    st.lists(st.floats(0, 50), min_size=1, max_size=30), st.lists(st.floats(0, 3), min_size=1, max_size=60)
)
def test_everything_expires_within_two_ticks(deadlines: list[float], steps: list[float]) -> None:
    wheel: Deadlines[Thing] = Deadlines(0.0)
    things = [Thing(deadline) for deadline in deadlines]
    for thing in things:
        wheel.add(thing)
    now, expired = 0.0, []
    for step in [*steps, 60.0]:
        now += step
        for thing in wheel.expired(now):
            assert thing.deadline <= now
            expired.append(thing)
        late = [thing for thing in things if thing not in expired and thing.deadline < now - 2 * TICK_S]
        assert late == []
    assert len(expired) == len(things)


@pytest.mark.parametrize("count", [100_000])
def test_many_things_leave_nothing_behind(count: int) -> None:
    wheel: Deadlines[Thing] = Deadlines(0.0)
    for number in range(count):
        thing = Thing(10.0 + number / 1000)
        wheel.add(thing)
        wheel.discard(thing)
    assert sum(len(things) for things in wheel._slots.values()) == 0
