"""Playbooks of a framed session: a device and a delivery that a test drives by hand."""

from collections.abc import Callable

import pytest

from gateway.errors import ControlError, LimitReached
from gateway.forward.framed import Answer, FramedSession, FramedTerms
from gateway.forward.message import Message
from gateway.forward.session import DeviceInfo
from gateway.forward.window import Sender
from gateway.wire.cloudevents import PayloadKind
from gateway.wire.framing import Reason
from gateway.wire.framings import FRAMINGS

INFO = DeviceInfo(
    "default", "meter-7", "meter-7", None, "01890a5d-ac96-774b-bcce-b302099a8057", {"site": "a"}
)


class FakeDevice:
    """Keeps what a session does with its device."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False
        self.receiving = True

    def send(self, data: bytes) -> None:
        self.sent += bytes(data)

    def finish(self) -> None:
        raise AssertionError("a framed session does not half-close")

    def close(self) -> None:
        self.closed = True

    def opened(self) -> None:
        raise AssertionError("a framed session has no opening")

    def pause_receiving(self) -> None:
        self.receiving = False

    def resume_receiving(self) -> None:
        self.receiving = True


class FakeDelivery:
    """Keeps messages until a test settles them."""

    def __init__(self) -> None:
        self.is_full = False
        self.messages: list[Message] = []
        self.unsettled: list[tuple[Message, Answer]] = []
        self.waiting: list[Sender] = []
        self.fills_up_at: int | None = None

    def when_free(self, sender: Sender) -> None:
        self.waiting.append(sender)

    def submit(self, message: Message, done: Answer) -> None:
        self.messages.append(message)
        self.unsettled.append((message, done))
        if len(self.messages) == self.fills_up_at:
            self.is_full = True

    def settle(self, reason: Reason | None = None, reply: bytes | None = None, count: int = 1) -> None:
        for _ in range(count):
            message, done = self.unsettled.pop(0)
            done(message, reason, reply)

    def free(self) -> None:
        self.is_full = False
        waiting, self.waiting = self.waiting, []
        for sender in waiting:
            sender.route_is_free()


class Log:
    def __init__(self) -> None:
        self.frames = 0
        self.reasons: list[Reason] = []
        self.dropped = 0

    def received(self) -> None:
        self.frames += 1

    def rejected(self, reason: Reason) -> None:
        self.reasons.append(reason)

    def reply_dropped(self, _why: str) -> None:
        self.dropped += 1


class Play:
    def __init__(
        self,
        framing: str = "lines",
        *,
        kind: PayloadKind = PayloadKind.TEXT,
        ack: bool = True,
        has_message_ids: bool = False,
    ) -> None:
        self.device = FakeDevice()
        self.delivery = FakeDelivery()
        self.log = Log()
        self._later: list[Callable[[], None]] = []
        self.session = FramedSession(
            self.device,
            INFO,
            FRAMINGS[framing].decoder(1000),
            self.delivery,
            FramedTerms(
                kind=kind,
                ack=ack,
                log=self.log,
                wall=lambda: 1700000000.0,
                soon=self._later.append,
                encode=FRAMINGS[framing].encode,
                has_message_ids=has_message_ids,
            ),
        )

    def run_soon(self) -> None:
        while self._later:
            self._later.pop(0)()

    def is_read(self) -> bool:
        return self.device.receiving

    def is_closed(self) -> bool:
        return self.device.closed

    def heard(self) -> bytes:
        self.run_soon()
        sent, self.device.sent = self.device.sent, b""
        return sent


def test_answers_come_in_order_and_in_one_record() -> None:
    play = Play()
    play.session.device_sent(b"one\n\xff\nthree\n")
    assert play.heard() == b""
    play.delivery.settle(count=2)
    assert play.heard() == b"ok 1\nerror 2 invalid\nok 3\n"
    assert [(m.payload, m.sequence, m.labels) for m in play.delivery.messages] == [
        (b"one", 1, {"site": "a"}),
        (b"three", 3, {"site": "a"}),
    ]


def test_without_acknowledgement_only_errors_are_told() -> None:
    play = Play(ack=False)
    play.session.device_sent(b"one\n\xff\ntwo\n")
    play.delivery.settle(count=2)
    assert play.heard() == b"error 2 invalid\n"


@pytest.mark.parametrize("framing", ["length16", "length32"])
def test_answers_are_framed_as_messages_are(framing: str) -> None:
    encode = FRAMINGS[framing].encode
    play = Play(framing)
    play.session.device_sent(encode(b"one") + encode(b"x" * 1001) + encode(b"three\n"))
    play.delivery.settle(count=2)
    assert play.heard() == encode(b"ok 1") + encode(b"error 2 too_long") + encode(b"ok 3")


def test_a_frame_that_its_device_cut_off() -> None:
    play = Play("length16")
    play.session.device_sent(b"\x00\x05abc")
    play.session.device_finished(orderly=True)
    assert play.heard() == FRAMINGS["length16"].encode(b"error 1 invalid")
    assert play.is_closed()


def test_ids_of_the_device() -> None:
    play = Play(has_message_ids=True)
    play.session.device_sent(b"m-1 21.5\nm-2\n")
    play.delivery.settle()
    assert play.heard() == b"ok 1\nerror 2 invalid\n"
    (message,) = play.delivery.messages
    assert (message.event_id, message.message_id, message.payload) == ("m-1", "m-1", b"21.5")


class TestReplies:
    @pytest.mark.parametrize(
        ("framing", "reply", "answer"),
        [
            ("lines", b"21 C", b"reply 1 21 C"),
            ("lines", b"21 C\r\n", b"reply 1 21 C"),
            ("lines", b"two\nlines", b"ok 1"),
            ("lines", b"", b"ok 1"),
            ("lines", None, b"ok 1"),
            ("length16", b"two\nlines\n", b"reply 1 two\nlines\n"),
            ("length16", b"x" * 65_527, b"reply 1 " + b"x" * 65_527),
            ("length16", b"x" * 65_528, b"ok 1"),
        ],
    )
    def test_what_fits(self, framing: str, reply: bytes | None, answer: bytes) -> None:
        encode = FRAMINGS[framing].encode
        play = Play(framing)
        play.session.device_sent(encode(b"?"))
        play.delivery.settle(None, reply)
        assert play.heard() == encode(answer)
        assert play.log.dropped == (bool(reply) and answer == b"ok 1")

    def test_a_refused_message_has_no_reply(self) -> None:
        play = Play()
        play.session.device_sent(b"?\n")
        play.delivery.settle(Reason.REFUSED, b"no")
        assert play.heard() == b"error 1 refused\n"


class TestCommands:
    def test_between_answers(self) -> None:
        play = Play()
        play.session.device_sent(b"one\n")
        play.session.send_command("c1", b"go")
        play.delivery.settle()
        assert play.heard() == b"command c1 go\nok 1\n"

    def test_one_that_does_not_fit(self) -> None:
        with pytest.raises(ControlError, match="a line break does not fit"):
            Play().session.send_command("c1", b"a\nb")

    def test_a_device_that_does_not_read(self) -> None:
        play = Play()
        play.session.pause_sending()
        with pytest.raises(LimitReached, match="does not read"):
            play.session.send_command("c1", b"x")
        play.session.resume_sending()
        play.session.send_command("c1", b"x")


class TestBounds:
    def test_what_waits_is_bounded_however_small_the_frames(self) -> None:
        play = Play()
        play.session.device_sent(b"\n" * 100_000)
        assert not play.is_read()
        assert len(play.delivery.messages) <= 256 + 4096
        taken = 0
        while play.delivery.unsettled:
            taken += len(play.delivery.unsettled)
            play.delivery.settle(count=len(play.delivery.unsettled))
            play.run_soon()
        assert taken == 100_000
        assert play.is_read()
        assert play.device.sent.endswith(b"ok 100000\n")

    def test_a_full_route_takes_nothing_from_its_sessions(self) -> None:
        play = Play()
        play.delivery.is_full = True
        play.session.device_sent(b"one\n")
        play.session.device_sent(b"two\nthr")
        assert not play.is_read()
        assert play.delivery.messages == []
        assert len(play.delivery.waiting) == 1
        play.delivery.free()
        assert play.is_read()
        play.session.device_sent(b"ee\n")
        assert [m.payload for m in play.delivery.messages] == [b"one", b"two", b"three"]

    def test_a_route_that_fills_up_meanwhile_takes_piece_after_piece(self) -> None:
        play = Play()
        lines = [b"%04d" % number for number in range(4000)]
        play.delivery.is_full = True
        play.session.device_sent(b"\n".join(lines[:1000]))
        play.session.device_sent(b"\n" + b"\n".join(lines[1000:]) + b"\n")
        before = 0
        while len(play.delivery.messages) < len(lines):
            assert not play.is_read()
            free, play.delivery.waiting = play.delivery.waiting, []
            play.delivery.is_full = False
            play.delivery.fills_up_at = before + 1
            for sender in free:
                sender.route_is_free()
            taken = len(play.delivery.messages)
            assert before < taken <= before + 4096 // 5 + 1
            before = taken
            play.delivery.settle(count=len(play.delivery.unsettled))
            play.run_soon()
        assert [m.payload for m in play.delivery.messages] == lines
        assert play.is_read()

    def test_a_session_that_stops_waits_for_no_full_route(self) -> None:
        play = Play()
        play.delivery.is_full = True
        play.session.device_sent(b"one\ntwo\n")
        play.session.device_sent(b"three\n")
        play.session.stop()
        assert play.heard() == b"error 1 stopping\nerror 2 stopping\nerror 3 stopping\n"
        assert play.is_closed()
        assert play.delivery.messages == []
        play.delivery.free()
        assert play.log.reasons == [Reason.STOPPING] * 3

    def test_a_full_route_and_the_end_of_the_device(self) -> None:
        play = Play()
        play.delivery.is_full = True
        play.session.device_sent(b"one\n")
        play.session.device_sent(b"two\nrest")
        play.session.device_finished(orderly=True)
        assert not play.is_closed()
        play.delivery.free()
        play.delivery.settle(count=3)
        assert play.heard() == b"ok 1\nok 2\nok 3\n"
        assert play.is_closed()

    def test_of_a_device_that_is_gone_everything_is_delivered(self) -> None:
        play = Play()
        play.session.device_sent(b"x\n" * 10_000)
        play.session.device_lost()
        while play.delivery.unsettled:
            play.delivery.settle(count=len(play.delivery.unsettled))
        assert len(play.delivery.messages) == 10_000
        assert play.heard() == b""


def test_stopping_refuses_and_closes_when_all_is_answered() -> None:
    play = Play()
    play.session.device_sent(b"one\n")
    play.session.stop()
    play.session.device_sent(b"two\n")
    assert not play.is_closed()
    play.delivery.settle()
    assert play.heard() == b"ok 1\nerror 2 stopping\n"
    assert play.is_closed()
