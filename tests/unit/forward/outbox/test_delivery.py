"""A spooled delivery over a sink that the test steers, on real files."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway.errors import BackendRefused, BackendUnavailable
from gateway.forward.delivery import WINDOW_MESSAGES_MAX
from gateway.forward.message import Message
from gateway.forward.outbox import SpooledDelivery
from gateway.forward.outbox.deliverer import BackOff
from gateway.forward.outbox.outbox import OutboxLimits
from gateway.forward.outbox.store import WEIGHT
from gateway.forward.receipt import Receipt
from gateway.forward.settings import SpoolSettings
from gateway.wire.framing import Reason
from tests.support.senders import Paused

DEADLINE_S = 30.0

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda test: runner.run(asyncio.wait_for(test, DEADLINE_S))


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once, so that tests are fast."""

    def soon(self: BackOff, _error: BackendUnavailable) -> float:
        self.failures += 1
        return 0.001

    monkeypatch.setattr(BackOff, "next", soon)
    monkeypatch.setattr("gateway.forward.outbox.delivery.SCAN_INTERVAL_S", 0.02)
    monkeypatch.setattr("gateway.forward.outbox.delivery.DRAIN_S", 0.2)


class Backend:
    """What arrived, shared by the sinks of all deliveries; `refuse` are never taken, while `away` nothing is."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.refuse: set[int] = set()
        self.away = False
        self.fault: Exception | None = None
        self.partial: int | None = None
        self.hangs = False

    async def open(self) -> None:
        if self.away:
            raise BackendUnavailable("away")

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise BackendUnavailable("away")
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        if self.partial is not None:
            batch, self.partial = batch[: self.partial], None
            self.arrived += [each.sequence for each in batch]
            return Receipt(settled=len(batch), error=BackendUnavailable("cut"))
        refused = {index: "never" for index, each in enumerate(batch) if each.sequence in self.refuse}
        self.arrived += [each.sequence for index, each in enumerate(batch) if index not in refused]
        return Receipt(refused=refused)

    async def close(self) -> None:
        pass


class Scene:
    def __init__(self, folder: Path, **settings: Any) -> None:
        self.backend = Backend()
        self.folder = folder
        self.settings = SpoolSettings(**settings)
        self.answers: list[tuple[int, Reason | None]] = []
        self.now = time.time()

    @contextlib.asynccontextmanager
    async def delivery(self, **changes: Any) -> AsyncIterator[SpooledDelivery]:
        delivery = SpooledDelivery(
            self.backend, self.folder, self.settings, workers=1, timeout_s=5, wall=lambda: self.now
        )
        delivery._limits = OutboxLimits(
            **{"weight_max": 1 << 30, "device_weight_max": 1 << 30, "group_messages_max": 10} | changes
        )
        with contextlib.suppress(BackendUnavailable):
            await delivery.open()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(delivery.run())
            try:
                yield delivery
            finally:
                await delivery.aclose()
                assert running.done()

    def submit(
        self, delivery: SpooledDelivery, *numbers: int, device: str = "d", payload: bytes = b"x"
    ) -> None:
        for number in numbers:
            message = Message("default", device, device, None, "session", number, self.now, payload)
            delivery.submit(message, self._answered)

    def _answered(self, message: Message, reason: Reason | None, reply: bytes | None = None) -> None:
        assert reply is None
        self.answers.append((message.sequence, reason))

    def accepted(self) -> list[int]:
        return [number for number, reason in self.answers if reason is None]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - polled within the deadline of the test
        await asyncio.sleep(0.005)


def test_acknowledged_on_commit_and_delivered_in_order(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        async with scene.delivery() as delivery:
            scene.submit(delivery, *range(1, 26))
            assert scene.answers == []  # never from within
            await until(lambda: len(scene.answers) == 25)
            assert scene.accepted() == list(range(1, 26))
            assert delivery.messages == 25
            assert delivery.bytes == 25 * (1 + WEIGHT)
            scene.now += 5
            await until(lambda: delivery.oldest_s)
            assert delivery.oldest_s == 5
            scene.backend.away = False
            await until(lambda: not delivery.messages)
            assert (delivery.bytes, delivery.oldest_s, delivery.dead_count) == (0, 0, 0)
        assert scene.backend.arrived == list(range(1, 26))

    run(test())


def test_the_next_life_goes_on(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        for start in (1, 101):
            async with scene.delivery() as delivery:
                scene.submit(delivery, *range(start, start + 100))
                await until(lambda: len(scene.answers) == start + 99)  # noqa: B023 - awaited here
        scene.backend.away = False
        async with scene.delivery() as delivery:
            assert delivery.messages == 200
            await until(lambda: not delivery.messages)
        assert scene.backend.arrived == list(range(1, 201))
        async with scene.delivery() as delivery:
            assert delivery.messages == 0
        assert len(list(scene.folder.glob("*.db"))) == 1

    run(test())


def test_more_than_memory_holds_comes_from_the_file_in_order(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        async with scene.delivery(ready_weight_max=20 * (1 + WEIGHT)) as delivery:
            for start in range(1, 500, 50):
                scene.submit(delivery, *range(start, start + 50))
                await until(lambda: len(scene.answers) == start + 49)  # noqa: B023 - awaited here
            assert delivery._own is not None
            assert delivery._own._queue.ready_weight <= 30 * (1 + WEIGHT)
            scene.backend.away = False
            for start in range(501, 1000, 50):
                scene.submit(delivery, *range(start, start + 50))
                await until(lambda: len(scene.answers) == start + 49)  # noqa: B023 - awaited here
            await until(lambda: not delivery.messages)
            assert not delivery._own._queue.is_behind
        assert scene.backend.arrived == list(range(1, 1001))

    run(test())


def test_a_part_of_a_batch_is_not_sent_again(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.partial = 13
        async with scene.delivery() as delivery:
            scene.submit(delivery, *range(1, 31))
            await until(lambda: len(scene.answers) == 30 and not delivery.messages)
        assert scene.backend.arrived == list(range(1, 31))

    run(test())


def test_a_batch_that_is_never_answered_is_sent_again(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.hangs = True
        delivery = SpooledDelivery(scene.backend, scene.folder, scene.settings, workers=1, timeout_s=0.05)
        await delivery.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(delivery.run())
            scene.submit(delivery, 1)
            await until(lambda: delivery._deliverers[0].is_failing)
            scene.backend.hangs = False
            await until(lambda: not delivery.messages)
            await delivery.aclose()
        assert scene.backend.arrived == [1]

    run(test())


def test_a_fault_in_a_client_library_is_an_outage(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.fault = ZeroDivisionError()
        async with scene.delivery() as delivery:
            scene.submit(delivery, 1)
            await until(lambda: scene.backend.arrived)
        assert scene.backend.arrived == [1]

    run(test())


def test_dead_letters(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.refuse = {2, 15, 30}
        async with scene.delivery() as delivery:
            scene.submit(delivery, *range(1, 31))
            await until(lambda: len(scene.answers) == 30 and not delivery.messages)
            assert scene.accepted() == list(range(1, 31))
            assert delivery.dead_count == 3
            assert delivery.bytes == 3 * (1 + WEIGHT)
            await delivery._own.flush()  # type: ignore[union-attr]
        async with scene.delivery() as delivery:
            letters = await delivery.dead_letters(None, 100)
            assert [(letter.id, letter.reason) for letter in letters] == [
                ("session-2", "never"),
                ("session-15", "never"),
                ("session-30", "never"),
            ]
            scene.backend.refuse = {15}
            assert await delivery.retry(["session-2", "session-15", "unknown"]) == 2
            await until(lambda: delivery.dead_count == 2 and not delivery.messages)
            assert await delivery.discard(["session-30"]) == 1
            scene.backend.refuse = set()
            await until(lambda: delivery._own is not None and not delivery._own._dead)
            assert await delivery.retry(None) == 1
            await until(lambda: not delivery.messages)
            assert (delivery.dead_count, delivery.bytes) == (0, 0)
        expected = [number for number in range(1, 31) if number not in {2, 15, 30}]
        assert scene.backend.arrived == [*expected, 2, 15]

    run(test())


def test_a_batch_with_an_unknown_culprit(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.fault = BackendRefused("one of them")
        async with scene.delivery() as delivery:
            scene.submit(delivery, *range(1, 11))
            await until(lambda: len(scene.answers) == 10 and not delivery.messages)
            assert delivery.dead_count == 0
        assert scene.backend.arrived == list(range(1, 11))

    run(test())


def test_what_waits_too_long_is_a_dead_letter(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool", age_max_s=60)
        scene.backend.away = True
        async with scene.delivery() as delivery:
            scene.submit(delivery, 1, 2)
            await until(lambda: len(scene.answers) == 2)
            scene.now += 61
            scene.submit(delivery, 3)
            await until(lambda: delivery.dead_count == 2)
            scene.backend.away = False
            await until(lambda: not delivery.messages)
            assert scene.backend.arrived == [3]
            await delivery._own.flush()  # type: ignore[union-attr]
            assert {letter.reason for letter in await delivery.dead_letters(None, 10)} == {"expired"}
        assert scene.backend.arrived == [3]

    run(test())


def test_bounds(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        weight = 1 + WEIGHT
        async with scene.delivery(weight_max=20 * weight, device_weight_max=15 * weight) as delivery:
            scene.submit(delivery, *range(1, 21), device="wild")
            await until(lambda: len(scene.answers) == 20)
            assert dict(scene.answers) == dict.fromkeys(range(1, 16)) | dict.fromkeys(
                range(16, 21), Reason.FULL
            )
            scene.submit(delivery, *range(21, 31), device="tame")
            await until(lambda: len(scene.answers) == 30)
            assert dict(scene.answers[20:]) == dict.fromkeys(range(21, 26)) | dict.fromkeys(
                range(26, 31), Reason.FULL
            )
            scene.backend.away = False
            await until(lambda: not delivery.messages)
            scene.submit(delivery, 31, device="huge", payload=bytes(16 * weight))  # one always fits
            await until(lambda: len(scene.answers) == 31)
            assert scene.answers[-1] == (31, None)

    run(test())


def test_a_commit_that_fails_is_answered_and_the_next_goes_on(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        async with scene.delivery() as delivery:
            assert delivery._own is not None
            store = delivery._own._store
            scene.submit(delivery, 1)
            await until(lambda: len(scene.answers) == 1)
            store._db.execute("PRAGMA max_page_count = 12")
            scene.submit(delivery, 2, payload=bytes(100_000))
            await until(lambda: len(scene.answers) == 2)
            assert scene.answers[1] == (2, Reason.FULL)
            assert delivery.messages == 1
            store._db.execute("PRAGMA max_page_count = 100000")
            scene.submit(delivery, 3)
            await until(lambda: len(scene.answers) == 3)
            scene.backend.away = False
            await until(lambda: not delivery.messages)
        assert scene.backend.arrived == [1, 3]

    run(test())


def test_a_full_disk_under_a_settled_spool_is_freed(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        async with scene.delivery() as delivery:
            assert delivery._own is not None
            store = delivery._own._store
            store._db.execute("PRAGMA max_page_count = 12")
            scene.submit(delivery, 1, payload=bytes(100_000))
            await until(lambda: len(scene.answers) == 1)
            assert scene.answers == [(1, Reason.FULL)]
            # The file was begun anew, and with it the bound of this test is gone.
            scene.submit(delivery, 2, payload=bytes(100_000))
            await until(lambda: scene.backend.arrived == [2])

    run(test())


def test_spools_without_owner_are_adopted_and_removed(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        async with scene.delivery() as one, scene.delivery() as two:
            scene.submit(one, 1, 2)
            scene.submit(two, 3, 4)
            await until(lambda: len(scene.answers) == 4)
        assert (
            len(list(scene.folder.glob("*.db"))) >= 2
        )  # an empty one may be more: claimed while it was made
        scene.backend.away = False
        async with scene.delivery():
            await until(lambda: len(scene.backend.arrived) == 4)
            await until(lambda: len(list(scene.folder.glob("*.db"))) == 1)
        assert len(list(scene.folder.glob("*.db"))) == 1
        assert [number for number in scene.backend.arrived if number < 3] == [1, 2]
        assert [number for number in scene.backend.arrived if number > 2] == [3, 4]

    run(test())


def test_what_waits_for_a_commit_is_bounded(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        waits = [*range(WINDOW_MESSAGES_MAX)]
        resumed: list[int] = []
        async with scene.delivery() as delivery:
            scene.submit(delivery, *waits[:-1])
            was_full = [delivery.is_full]
            scene.submit(delivery, waits[-1])
            was_full.append(delivery.is_full)
            delivery.when_free(Paused(lambda: resumed.append(len(scene.answers))))
            await until(lambda: len(scene.answers) == len(waits))
            was_full.append(delivery.is_full)
        assert was_full == [False, True, False]
        # Answered within the commit that made room, ten at a time.
        assert WINDOW_MESSAGES_MAX // 2 - 10 <= resumed[0] <= WINDOW_MESSAGES_MAX // 2
        assert scene.answers == [(number, None) for number in waits]

    run(test())


def test_what_comes_before_the_spool_is_open_waits(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        delivery = SpooledDelivery(scene.backend, scene.folder, scene.settings, workers=1, timeout_s=5)
        resumed: list[bool] = []
        scene.submit(delivery, 1)
        assert delivery.is_full
        delivery.when_free(Paused(lambda: resumed.append(True)))
        await delivery.open()
        assert resumed == [True]
        await until(lambda: scene.answers == [(1, None)])
        assert delivery._early is None
        await delivery.aclose()

    run(test())


def test_a_folder_that_cannot_be_written_refuses_until_it_can(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "file" / "spool")
        (tmp_path / "file").touch()
        async with scene.delivery() as delivery:
            scene.submit(delivery, 1)
            await until(lambda: scene.answers == [(1, Reason.UNAVAILABLE)])
            (tmp_path / "file").unlink()
            await until(lambda: delivery._own is not None)
            scene.submit(delivery, 2)
            await until(lambda: scene.backend.arrived == [2])

    run(test())


def test_a_spool_that_cannot_be_opened_is_passed_over(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        async with scene.delivery() as delivery:
            scene.submit(delivery, 1)
            await until(lambda: scene.answers)
        (spool,) = scene.folder.glob("*.db")
        with contextlib.closing(sqlite3.connect(spool)) as connection:
            connection.execute("PRAGMA user_version = 99")
        scene.backend.away = False
        async with scene.delivery() as delivery:
            await until(lambda: delivery._own is not None)
            scene.submit(delivery, 2)
            await until(lambda: scene.backend.arrived == [2])
        assert spool.exists()

    run(test())


def test_after_closing_nothing_is_taken(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        async with scene.delivery() as delivery:
            pass
        scene.submit(delivery, 1)
        await until(lambda: scene.answers == [(1, Reason.STOPPING)])

    run(test())


def test_few_commits_under_load_and_none_to_wait_for_alone(run: Run, tmp_path: Path) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        commits: list[float] = []
        delivery = SpooledDelivery(
            scene.backend, scene.folder, scene.settings, workers=1, timeout_s=5, on_commit=commits.append
        )
        await delivery.open()
        scene.submit(delivery, *range(1, 2001))
        await until(lambda: len(scene.answers) == 2000)
        assert len(commits) == 4  # 500 each
        await delivery.aclose()

    run(test())


class TestBackOff:
    def test_grows_with_jitter_up_to_a_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        back_off = BackOff(first_s=0.1, max_s=1.0)
        waits = [back_off.next(BackendUnavailable("away")) for _ in range(60)]
        for wait, longest in zip(waits, [0.1, 0.2, 0.4, 0.8] + [1.0] * 56, strict=True):
            assert longest / 2 <= wait <= longest
        assert len(set(waits[10:])) > 1

    def test_the_backend_may_ask_for_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert BackOff().next(BackendUnavailable("busy", 20)) == 20
        assert BackOff().next(BackendUnavailable("busy", 1e9)) == 300


def test_a_spool_that_cannot_be_removed_is_left_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        scene = Scene(tmp_path / "spool")
        scene.backend.away = True
        async with scene.delivery() as one, scene.delivery() as two:
            scene.submit(one, 1)
            scene.submit(two, 2)
            await until(lambda: len(scene.answers) == 2)
        scene.backend.away = False
        monkeypatch.setattr("gateway.forward.outbox.folder._SIDE_FILES", ("x" * 300,))  # a real ENAMETOOLONG
        async with scene.delivery() as delivery:
            await until(lambda: len(scene.backend.arrived) == 2)
            await until(lambda: delivery._unusable)
            scene.submit(delivery, 3)
            await until(lambda: scene.backend.arrived[2:] == [3])
        assert len(list(scene.folder.glob("*.db"))) >= 2
        monkeypatch.undo()
        async with scene.delivery():
            await until(lambda: len(list(scene.folder.glob("*.db"))) == 1)

    run(test())
