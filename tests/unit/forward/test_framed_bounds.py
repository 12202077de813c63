"""A framed session as a playbook: what the device and the backend do, and what the device is told."""

import random
from collections import deque
from collections.abc import Callable

import pytest

from gateway.forward.framed import Answer, FramedSession, FramedTerms
from gateway.forward.message import Message
from gateway.forward.session import DeviceInfo
from gateway.forward.window import Sender
from gateway.wire.cloudevents import PayloadKind
from gateway.wire.framing import LineDecoder, Reason

UNANSWERED_MAX = 256 + 4096
"""The bound, and the frames of one piece on top of it."""


class Stage:
    """Device, backend and event loop of one session, all in the test's hands."""

    def __init__(self, *, kind: PayloadKind = PayloadKind.TEXT, ack: bool = True) -> None:
        self.sent = b""
        self.closed = False
        self.reading = True
        self.rejected_reasons: list[Reason] = []
        self.received_count = 0
        self.submitted: deque[tuple[Message, Answer]] = deque()
        self.delivered: list[bytes] = []
        self._soon: deque[Callable[[], None]] = deque()
        self.session = FramedSession(
            self, DeviceInfo("r", "d", "i", None, "s"), LineDecoder(100), self,
            FramedTerms(kind=kind, ack=ack, log=self, wall=lambda: 1.0, soon=self._soon.append),
        )  # fmt: skip

    # The device's end

    def send(self, data: bytes) -> None:
        assert not self.closed
        self.sent += bytes(data)

    def finish(self) -> None:
        raise AssertionError("a framed session closes, it does not finish")

    def close(self) -> None:
        self.closed = True

    def pause_receiving(self) -> None:
        self.reading = False

    def resume_receiving(self) -> None:
        self.reading = True

    def opened(self) -> None:
        raise AssertionError("a framed session has no opening")

    # The backend and the metrics

    is_full = False

    def when_free(self, sender: Sender) -> None:
        raise AssertionError(f"this route is never full: {sender}")

    def reply_dropped(self, why: str) -> None:
        raise AssertionError(f"this route carries no replies: {why}")

    def submit(self, message: Message, done: Answer) -> None:
        self.submitted.append((message, done))

    def received(self) -> None:
        self.received_count += 1

    def rejected(self, reason: Reason) -> None:
        self.rejected_reasons.append(reason)

    # What the test does

    def confirm(self, count: int = 1 << 30, reason: Reason | None = None) -> None:
        """The backend answers so many of what was submitted, oldest first."""
        for _ in range(min(count, len(self.submitted))):
            message, done = self.submitted.popleft()
            if reason is None:
                self.delivered.append(message.payload)
            done(message, reason)

    def turn(self) -> None:
        """The event loop does what was left for later."""
        while self._soon:
            self._soon.popleft()()

    def settle(self) -> None:
        """Everything that can go on goes on."""
        while self.submitted or self._soon:
            self.confirm()
            self.turn()

    @property
    def answers(self) -> list[str]:
        return self.sent.decode().splitlines()


def test_answers_come_in_order_and_refusals_do_not_overtake() -> None:
    stage = Stage()
    stage.session.device_sent(b"1\n\xff\n3\n" + b"x" * 101 + b"\n5\n")
    stage.turn()
    assert stage.answers == []
    stage.confirm(1)
    stage.turn()
    assert stage.answers == ["ok 1", "error 2 invalid"]
    stage.confirm(1, Reason.UNAVAILABLE)
    stage.confirm()
    stage.turn()
    assert stage.answers[2:] == ["error 3 unavailable", "error 4 too_long", "ok 5"]
    assert stage.rejected_reasons == [Reason.INVALID, Reason.TOO_LONG, Reason.UNAVAILABLE]
    assert stage.received_count == 5


@pytest.mark.parametrize("seed", range(5))
def test_the_pieces_in_which_bytes_come_make_no_difference(seed: int) -> None:
    source = random.Random(seed)
    lines = [source.choice([b"", b"a", b"b" * 100, b"c" * 200, b"\xff"]) for _ in range(2_000)]
    wire = b"\n".join(lines)
    whole, cut = Stage(), Stage()
    whole.session.device_sent(wire)
    at = 0
    while at < len(wire):
        size = source.choice([1, 50, 5_000, 50_000])
        cut.session.device_sent(wire[at : at + size])
        at += size
        if source.random() < 0.5:
            cut.confirm(source.randrange(300))
            cut.turn()
    for stage in (whole, cut):
        stage.session.device_finished(orderly=True)
        stage.settle()
        assert stage.closed
    assert whole.answers == cut.answers
    assert len(whole.answers) == len(lines) - (not lines[-1])
    assert whole.delivered == cut.delivered


@pytest.mark.parametrize(("line", "kind"), [(b"", PayloadKind.TEXT), (b"{", PayloadKind.JSON)])
def test_what_waits_is_bounded_however_much_comes_at_once(line: bytes, kind: PayloadKind) -> None:
    stage = Stage(kind=kind)
    count = 100_000
    stage.session.device_sent((line + b"\n") * count)
    most = 0
    while stage.received_count < count:
        most = max(most, stage.received_count - len(stage.answers))
        assert not stage.reading
        stage.confirm()
        stage.turn()
    stage.settle()
    assert most <= UNANSWERED_MAX
    assert stage.reading
    assert len(stage.answers) == count


def test_refusals_behind_a_message_that_waits_are_bounded_too() -> None:
    stage = Stage()
    stage.session.device_sent(b"waits\n" + b"\xff\n" * 50_000)
    stage.turn()
    assert stage.received_count <= UNANSWERED_MAX
    assert not stage.reading
    stage.settle()
    assert len(stage.answers) == 50_001


def test_a_device_that_does_not_read_is_not_read_either() -> None:
    stage = Stage()
    stage.session.device_sent(b"\n" * 10_000)
    stage.session.pause_sending()
    stage.settle()
    assert stage.received_count <= UNANSWERED_MAX
    assert not stage.reading
    stage.session.resume_sending()
    stage.settle()
    assert len(stage.answers) == 10_000
    assert stage.reading


def test_what_a_lost_device_sent_is_delivered() -> None:
    stage = Stage()
    stage.session.device_sent(b"x\n" * 10_000)
    stage.session.pause_sending()
    stage.session.device_lost()
    stage.settle()
    assert len(stage.delivered) == 10_000
    assert stage.sent == b""
    assert not stage.closed


@pytest.mark.parametrize("orderly", [True, False])
def test_the_end_waits_for_every_answer(*, orderly: bool) -> None:
    stage = Stage()
    stage.session.device_sent(b"x\n" * 10_000 + b"rest")
    stage.session.device_finished(orderly=orderly)
    assert not stage.closed
    stage.settle()
    assert len(stage.answers) == 10_000 + orderly
    assert stage.closed


def test_the_end_after_the_device_was_slow() -> None:
    stage = Stage()
    stage.session.pause_sending()
    stage.session.device_sent(b"rest that does not count")
    stage.session.device_finished(orderly=False)
    assert not stage.closed
    stage.session.resume_sending()
    assert stage.closed


def test_a_stopped_session_answers_what_is_under_way_and_refuses_the_rest() -> None:
    stage = Stage()
    stage.session.device_sent(b"x\n" * 10_000)
    under_way = stage.received_count
    stage.session.stop()
    stage.session.device_sent(b"late\n")
    assert not stage.closed
    stage.settle()
    assert stage.answers == [f"ok {n}" if n <= under_way else f"error {n} stopping" for n in range(1, 10_002)]
    assert stage.closed


def test_without_ack_only_errors_are_answered() -> None:
    stage = Stage(ack=False)
    stage.session.device_sent(b"1\n\xff\n3\n")
    stage.settle()
    assert stage.answers == ["error 2 invalid"]
    stage.session.device_finished(orderly=True)
    assert stage.closed
