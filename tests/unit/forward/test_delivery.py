import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway.errors import BackendRefused, BackendUnavailable
from gateway.forward.backends.file import FileBackend, FileSettings
from gateway.forward.delivery import BATCH_MESSAGES_MAX, WINDOW_MESSAGES_MAX, Attempt, DirectDelivery
from gateway.forward.framed import FramedSession, FramedTerms
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from gateway.forward.session import DeviceInfo
from gateway.forward.window import MESSAGE_BYTES
from gateway.wire.cloudevents import PayloadKind
from gateway.wire.framing import Reason
from gateway.wire.framings import FRAMINGS
from tests.support.senders import Paused

DEADLINE_S = 30.0

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda test: runner.run(asyncio.wait_for(test, DEADLINE_S))


def message(number: int, payload: bytes = b"x") -> Message:
    return Message("default", "d", "d", None, "session", number, 0.0, payload)


class SteeredSink:
    """A sink whose batches the test sees when they come and ends as it likes."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[list[int]] = asyncio.Queue()
        self.outcomes: asyncio.Queue[Exception | Receipt | None] = asyncio.Queue()
        self.open_calls = self.close_calls = 0

    async def open(self) -> None:
        self.open_calls += 1

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        assert self.close_calls == 0
        self.arrived.put_nowait([each.sequence for each in batch])
        outcome = await self.outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        self.close_calls += 1


class Scene:
    """A delivery that runs, and everything that it answered, in order."""

    def __init__(self, **settings: Any) -> None:
        self.sink = SteeredSink()
        self.attempts: list[Attempt] = []
        self.answers: list[tuple[int, Reason | None]] = []
        self.replies: dict[int, bytes] = {}
        self.delivery = DirectDelivery(self.sink, on_attempt=self.attempts.append, **settings)

    def submit(self, *numbers: int, payload: bytes = b"x") -> None:
        for number in numbers:
            self.delivery.submit(message(number, payload), self.answer)

    def answer(self, message: Message, reason: Reason | None, reply: bytes | None = None) -> None:
        self.answers.append((message.sequence, reason))
        if reply is not None:
            self.replies[message.sequence] = reply

    def end_batch(self, outcome: Exception | None = None) -> None:
        self.sink.outcomes.put_nowait(outcome)

    async def play(self, scene: Callable[["Scene"], Awaitable[None]]) -> None:
        await self.delivery.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.delivery.run())
            await scene(self)
            await self.delivery.aclose()
        assert self.sink.close_calls == 1
        assert self.delivery.pending == 0


def ok(*numbers: int) -> list[tuple[int, Reason | None]]:
    return [(number, None) for number in numbers]


def test_what_comes_while_a_batch_is_out_is_the_next_batch(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1)
        assert await scene.sink.arrived.get() == [1]
        scene.submit(2, 3)
        scene.submit(4)
        assert scene.delivery.pending == 4
        assert scene.answers == []
        scene.end_batch()
        assert await scene.sink.arrived.get() == [2, 3, 4]
        assert scene.answers == ok(1)
        assert scene.delivery.pending == 3
        scene.end_batch()

    played = Scene()
    run(played.play(scene))
    assert played.answers == ok(1, 2, 3, 4)


def test_batches_are_bounded_by_messages(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1, 2, 3, 4, 5)
        for expected in ([1, 2], [3, 4], [5]):
            assert await scene.sink.arrived.get() == expected
            scene.end_batch()

    played = Scene(batch_messages_max=2)
    run(played.play(scene))
    assert played.answers == ok(1, 2, 3, 4, 5)


def test_batches_are_bounded_by_bytes_but_a_large_message_goes_alone(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1, 2, 3, payload=bytes(40))
        scene.submit(4, payload=bytes(1000))
        scene.submit(5, payload=bytes(40))
        for expected in ([1, 2], [3], [4], [5]):
            assert await scene.sink.arrived.get() == expected
            scene.end_batch()

    run(Scene(batch_bytes_max=100).play(scene))


def test_a_failed_batch_is_answered_with_the_reason_and_the_next_goes_on(run: Run) -> None:
    error = BackendUnavailable("disk full")

    async def scene(scene: Scene) -> None:
        scene.submit(1, 2)
        scene.end_batch(error)
        scene.end_batch()
        assert await scene.sink.arrived.get() == [1, 2]
        scene.submit(3)

    played = Scene()
    run(played.play(scene))
    assert played.answers == [(1, Reason.UNAVAILABLE), (2, Reason.UNAVAILABLE), (3, None)]
    assert [(tried.messages, tried.delivered, tried.error) for tried in played.attempts] == [
        (2, 0, error),
        (1, 1, None),
    ]
    assert all(tried.duration_s >= 0 for tried in played.attempts)


def test_a_refused_batch_is_halved_until_the_culprit_is_found(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1, 2, 3, 4)
        for expected, outcome in (
            ([1, 2, 3, 4], BackendRefused("one of them")),
            ([1, 2], None),
            ([3, 4], BackendRefused("one of them")),
            ([3], BackendRefused("this one")),
            ([4], None),
        ):
            assert await scene.sink.arrived.get() == expected
            assert not scene.answers
            scene.end_batch(outcome)

    played = Scene()
    run(played.play(scene))
    assert played.answers == [(1, None), (2, None), (3, Reason.REFUSED), (4, None)]
    (tried,) = played.attempts
    assert (tried.messages, tried.delivered, tried.refused, tried.refusal) == (4, 3, 1, "this one")


def test_a_backend_that_fails_while_the_culprit_is_looked_for(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1, 2, 3, 4)
        for outcome in (
            BackendRefused("one of them"),
            BackendRefused("one of them"),
            BackendRefused("1"),
            None,
        ):
            scene.end_batch(outcome)
        scene.end_batch(BackendUnavailable("away"))

    played = Scene()
    run(played.play(scene))
    assert [reason for _, reason in played.answers] == [
        Reason.REFUSED,
        None,
        Reason.UNAVAILABLE,
        Reason.UNAVAILABLE,
    ]


def test_a_receipt_tells_of_each_message(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1, 2, 3, 4)
        scene.sink.outcomes.put_nowait(
            Receipt(refused={0: "no"}, replies={1: b"hello"}, settled=3, error=BackendUnavailable("cut"))
        )

    played = Scene()
    run(played.play(scene))
    assert played.answers == [(1, Reason.REFUSED), (2, None), (3, None), (4, Reason.UNAVAILABLE)]
    assert played.replies == {2: b"hello"}


def test_a_backend_that_never_answers_is_given_up(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1)
        assert await scene.sink.arrived.get() == [1]
        while not scene.answers:  # noqa: ASYNC110 - polled within the deadline of the test
            await asyncio.sleep(0.01)
        scene.submit(2)
        scene.end_batch()

    played = Scene(timeout_s=0.05)
    run(played.play(scene))
    assert played.answers == [(1, Reason.UNAVAILABLE), (2, None)]


def test_what_waits_is_bounded(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        resumed: list[bool] = []
        payload = bytes(1000 - MESSAGE_BYTES)
        scene.submit(*range(10), payload=payload)
        assert scene.delivery.is_full
        scene.delivery.when_free(Paused(lambda: resumed.append(True)))
        scene.submit(*range(10, 25), payload=payload)
        assert scene.delivery.pending == 20
        await asyncio.sleep(0)
        assert scene.answers == [(number, Reason.FULL) for number in range(20, 25)]
        assert not resumed
        scene.end_batch()
        scene.end_batch()
        while not resumed:  # noqa: ASYNC110 - polled within the deadline of the test
            await asyncio.sleep(0)
        assert not scene.delivery.is_full

    played = Scene(window_bytes_max=10_000)
    run(played.play(scene))
    assert sorted(number for number, reason in played.answers if reason is None) == list(range(20))


def test_no_more_waits_than_the_next_batch(run: Run) -> None:
    """A hundred sessions that send more than enough: what is beyond two batches stays with them, as it came."""

    class Device:
        def __init__(self) -> None:
            self.heard = b""

        def send(self, data: bytes) -> None:
            self.heard += data

        def pause_receiving(self) -> None: ...

        def resume_receiving(self) -> None: ...

    class Log:
        def received(self) -> None: ...

        def rejected(self, reason: Reason) -> None:
            raise AssertionError(reason)

    async def scene(scene: Scene) -> None:
        devices = [Device() for _ in range(100)]
        lines, piece = b"x\n" * 100, 100
        terms = FramedTerms(
            kind=PayloadKind.TEXT,
            ack=True,
            log=Log(),  # type: ignore[arg-type]  # no reply is dropped
            wall=lambda: 0.0,
            soon=asyncio.get_running_loop().call_soon,
        )
        for device in devices:
            session = FramedSession(
                device,  # type: ignore[arg-type]  # the part that such a session uses
                DeviceInfo("default", "d", "d", None, "session"),
                FRAMINGS["lines"].decoder(100),
                scene.delivery,
                terms,
            )
            session.device_sent(lines)
        batches: list[int] = []
        while sum(batches) < len(devices) * 100:
            batches.append(len(await scene.sink.arrived.get()))
            assert scene.delivery.pending <= WINDOW_MESSAGES_MAX + piece
            scene.end_batch()
        await until_heard(devices)
        assert batches == [BATCH_MESSAGES_MAX] * 20

    async def until_heard(devices: list[Device]) -> None:
        while not all(each.heard.endswith(b"ok 100\n") for each in devices):  # noqa: ASYNC110 - polled within the deadline of the test
            await asyncio.sleep(0)

    run(Scene().play(scene))


def test_aclose_drains_first(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1)
        await scene.sink.arrived.get()
        scene.submit(2, 3)
        async with asyncio.TaskGroup() as tasks:
            closing = tasks.create_task(scene.delivery.aclose())
            await asyncio.sleep(0)
            assert scene.sink.close_calls == 0
            scene.submit(4)
            assert scene.answers == []  # never from within submit
            scene.end_batch()
            scene.end_batch()
        assert closing.done()
        assert scene.sink.close_calls == 1

    async def test(played: Scene) -> None:
        await played.delivery.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(played.delivery.run())
            await scene(played)

    played = Scene()
    run(test(played))
    assert sorted(played.answers) == [(1, None), (2, None), (3, None), (4, Reason.STOPPING)]
    assert [answer for answer in played.answers if answer[1] is None] == ok(1, 2, 3)


def test_cancelled_run_answers_everything_once_and_in_order(run: Run) -> None:
    async def test(played: Scene) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(played.delivery.run())
            played.submit(1, 2)
            await played.sink.arrived.get()
            played.submit(3)
            running.cancel()
        assert played.answers == [(number, Reason.STOPPING) for number in (1, 2, 3)]
        assert played.delivery.pending == 0
        played.submit(4)
        await played.delivery.aclose()
        await asyncio.sleep(0)
        assert played.answers[3:] == [(4, Reason.STOPPING)]

    run(test(Scene()))


def test_a_fault_in_a_client_library_is_an_outage(run: Run) -> None:
    async def scene(scene: Scene) -> None:
        scene.submit(1, 2)
        assert await scene.sink.arrived.get() == [1, 2]
        scene.submit(3)
        scene.end_batch(ZeroDivisionError())
        scene.end_batch()

    played = Scene()
    run(played.play(scene))
    assert played.answers == [(1, Reason.UNAVAILABLE), (2, Reason.UNAVAILABLE), (3, None)]
    assert isinstance(played.attempts[0].error, BackendUnavailable)


def test_close_without_run(run: Run) -> None:
    async def test(played: Scene) -> None:
        await played.delivery.open()
        await played.delivery.aclose()
        assert played.sink.close_calls == 1
        await played.delivery.run()  # a task that starts late ends at once

    run(test(Scene()))


def test_close_before_the_task_has_started_delivers(run: Run) -> None:
    async def test(played: Scene) -> None:
        played.end_batch()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(played.delivery.run())
            played.submit(1)
            await played.delivery.aclose()
        assert played.answers == ok(1)

    run(test(Scene()))


def test_to_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "later" / "events.jsonl"
    settings = FileSettings(kind="file", path=str(path))
    answers: list[tuple[int, Reason | None]] = []
    attempts: list[Attempt] = []

    async def test() -> None:
        delivery = DirectDelivery(
            FileBackend("events", settings, "text/plain", tmp_path / "unused"), on_attempt=attempts.append
        )
        with pytest.raises(BackendUnavailable):
            await delivery.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(delivery.run())
            await submit_all(delivery, range(1, 11))
            path.parent.mkdir()
            for start in range(11, 1011, 100):
                await submit_all(delivery, range(start, start + 100))
            await delivery.aclose()

    async def submit_all(delivery: DirectDelivery, numbers: range) -> None:
        settled = asyncio.Event()

        def answered(message: Message, reason: Reason | None, _reply: bytes | None = None) -> None:
            answers.append((message.sequence, reason))
            if message.sequence == numbers[-1]:
                settled.set()

        for number in numbers:
            delivery.submit(message(number, b"%d" % number), answered)
        await settled.wait()

    run(test())
    assert answers == [(number, Reason.UNAVAILABLE) for number in range(1, 11)] + ok(*range(11, 1011))
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [int(event["data"]) for event in events] == list(range(11, 1011))
    assert sum(attempt.messages for attempt in attempts) == 1010
