"""A framed route: the device's frames become messages, each answered once, in order.

Every frame gets a number, refused ones too. Its answer waits until all earlier frames have theirs: the backend confirms
in order, but a refusal is known at once and may not overtake. Commands go to the device between the answers.

A frame of one byte becomes a message and an answer of hundreds, so one read of the device can hold far more than may
wait. Therefore bytes are taken in small pieces; once too much is unanswered, or the route is full, the rest stays as it
came, and the device is not read, until answers have left.
"""

from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from gateway.errors import ControlError, LimitReached
from gateway.forward.message import Message
from gateway.forward.session import DeviceEnd, DeviceInfo
from gateway.forward.window import Sender
from gateway.wire.cloudevents import PayloadKind, check_payload
from gateway.wire.framing import (
    Frame,
    FrameDecoder,
    Oversized,
    Reason,
    Truncated,
    encode_command,
    encode_error,
    encode_line,
    encode_ok,
    encode_reply,
    split_message_id,
)

__all__ = ["Answer", "Delivery", "FramedSession", "FramedTerms", "MessageLog"]

_UNANSWERED_MAX: Final = 256
"""Frames of one session that may wait for their answer; 256 of 100 bytes fill a batch, more only wait in memory."""
_UNCONFIRMED_BYTES_MAX: Final = 256 * 1024
"""Their payload while it waits for the backend. One message of `message_bytes_max` always fits."""
_PIECE_BYTES: Final = 4096
"""What is decoded before the bounds are looked at: so many frames may come on top of them."""


class Answer(Protocol):
    """What becomes of a message. `reply` is what the backend answers, on a route that carries replies.

    It is told which message, so that one function serves all of a session: of messages that wait there are many.
    """

    def __call__(self, message: Message, reason: Reason | None, reply: bytes | None = None, /) -> None:
        """Must not raise."""


class Delivery(Protocol):
    """The route's way to its backend, shared by all sessions of the worker."""

    @property
    def is_full(self) -> bool:
        """Whether too much is unconfirmed: then take nothing more."""

    def when_free(self, sender: Sender) -> None:
        """Tell `sender` once, when it is not full any more."""

    def submit(self, message: Message, done: "Answer") -> None:
        """Deliver; `done` is called exactly once with it, never from within: None when it is safe, else why not."""


class MessageLog(Protocol):
    """What becomes of messages, for the metrics of the route."""

    def received(self) -> None:
        """A frame came in, good or bad."""

    def rejected(self, reason: Reason) -> None:
        """A frame was refused."""

    def reply_dropped(self, why: str) -> None:
        """The backend's reply does not fit the framing of the route: the device was told `ok` in its place."""


class FramedTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What all sessions of a framed route have in common."""

    kind: PayloadKind
    ack: bool
    """whether each frame that is safe is answered"""
    log: MessageLog
    wall: Callable[[], float]
    """Unix seconds, for the receive time"""
    soon: Callable[[Callable[[], None]], object]
    """runs a function after what the event loop does now, so that the answers to a batch leave in one record"""
    encode: Callable[[bytes], bytes] = encode_line
    """makes a frame of what a device is told"""
    has_message_ids: bool = False
    """whether each frame begins with an id of the device's own"""


class FramedSession:
    """One session of a framed route, a `RouteSession`. `decoder` takes apart what the device sends."""

    __slots__ = (
        "_answered", "_answers", "_decoder", "_delivery", "_device", "_device_slow", "_early", "_finished", "_held",
        "_held_from", "_info", "_lost", "_number", "_paused", "_rest_counts", "_route_full", "_stopping", "_terms",
        "_unconfirmed", "_unconfirmed_bytes",
    )  # fmt: skip

    def __init__(
        self,
        device: DeviceEnd,
        info: DeviceInfo,
        decoder: FrameDecoder,
        delivery: Delivery,
        terms: FramedTerms,
    ) -> None:
        self._device = device
        self._info = info
        self._decoder = decoder
        self._delivery = delivery
        self._terms = terms
        self._number = 0
        self._answered = 0  # the last frame that has its answer, and so have all before it
        self._early: dict[int, bytes] | None = None  # made when an answer first overtakes another
        self._answers: list[bytes] | None = None  # those that are due; an idle session keeps no empty list
        self._held = b""  # what came while there was no room,
        self._held_from = 0  # and so much of it is taken
        self._unconfirmed = 0
        self._unconfirmed_bytes = 0
        self._paused = False
        self._device_slow = False
        self._route_full = False
        self._finished = False
        self._rest_counts = False
        self._stopping = False
        self._lost = False

    @property
    def messages(self) -> int:
        """How many frames came in."""
        return self._number

    def device_sent(self, data: bytes) -> None:
        """Take the frames that these bytes complete, now or when there is room for them."""
        if len(data) <= _PIECE_BYTES and not self._held and self._has_room():
            self._take(self._decoder.feed(data))
        else:
            self._held = self._held[self._held_from :] + data
            self._held_from = 0
            self._take_held()

    def device_finished(self, *, orderly: bool) -> None:
        """Answer everything that was received, then end. A rest without its end counts only after close_notify."""
        self._finished = True
        self._rest_counts = orderly
        self._take_held()
        self._end_if_settled()

    def device_lost(self) -> None:
        """What was received is delivered all the same; nobody hears the answers."""
        self._lost = True
        self._device_slow = False
        self._answers = None
        self._early = None
        if self._held:
            self._go_on()
            self._go_on_if_room()

    def pause_sending(self) -> None:
        """A device that does not read its answers sends nothing more."""
        self._device_slow = True
        self._device.pause_receiving()

    def resume_sending(self) -> None:
        """It reads again."""
        self._device_slow = False
        self._go_on()
        self._end_if_settled()

    def stop(self) -> None:
        """Refuse what comes from now on, answer what is under way, then close."""
        self._stopping = True
        self._take_held()
        self._end_if_settled()

    def send_command(self, command_id: str, payload: bytes) -> None:
        """Frame a command to the device. Raises ControlError when it does not fit, LimitReached while nothing is read."""
        if self._device_slow:
            raise LimitReached("the device does not read what is sent to it: try again later")
        try:
            frame = self._terms.encode(encode_command(command_id, payload))
        except ValueError as exc:
            raise ControlError(f"the payload cannot be sent: {exc}") from exc
        self._device.send(frame)

    def route_is_free(self) -> None:
        """The route has room again."""
        self._route_full = False
        self._go_on()
        self._end_if_settled()

    @property
    def _is_held_back(self) -> bool:
        """Whether something keeps frames from being taken; what it is lets go on when it is over."""
        return self._paused or self._device_slow or (self._route_full and not self._stopping)

    def _has_room(self) -> bool:
        """Whether frames may be taken now; if the route is full it will say when they may.

        While the session stops they are refused, which takes no room in the route.
        """
        if self._is_held_back:
            return False
        if self._delivery.is_full and not self._stopping:
            self._route_full = True
            self._device.pause_receiving()
            self._delivery.when_free(self)
            return False
        return True

    @property
    def _unanswered(self) -> int:
        return self._unconfirmed + len(self._early or ()) + len(self._answers or ())

    def _take_held(self) -> None:
        """Take what is held as far as the bounds allow, and then the end of the device."""
        while self._held and self._has_room():
            piece = self._held[self._held_from : self._held_from + _PIECE_BYTES]
            self._held_from += _PIECE_BYTES
            if self._held_from >= len(self._held):
                self._held, self._held_from = b"", 0
            self._take(self._decoder.feed(piece))
        if self._rest_counts and not self._held:
            self._rest_counts = False
            if rest := self._decoder.finish():
                self._take(rest)

    def _go_on(self) -> None:
        """There may be room: take what is held, then read the device again."""
        self._take_held()
        if not (self._is_held_back or self._lost):
            self._device.resume_receiving()

    def _go_on_if_room(self) -> None:
        """Go on once half of what may wait has left."""
        if (
            self._paused
            and self._unanswered <= _UNANSWERED_MAX // 2
            and self._unconfirmed_bytes <= _UNCONFIRMED_BYTES_MAX // 2
        ):
            self._paused = False
            self._go_on()

    def _take(self, frames: list[Frame]) -> None:
        terms = self._terms
        received_at = terms.wall() if frames else 0.0
        settled = self._settled
        for frame in frames:
            self._number = number = self._number + 1
            terms.log.received()
            message = self._message(number, received_at, frame)
            if isinstance(message, Reason):
                terms.log.rejected(message)
                self._answer(number, self._refusal(number, message))
                continue
            self._unconfirmed += 1
            self._unconfirmed_bytes += len(message.payload)
            self._delivery.submit(message, settled)
        if not self._paused and (
            self._unanswered >= _UNANSWERED_MAX or self._unconfirmed_bytes >= _UNCONFIRMED_BYTES_MAX
        ):
            self._paused = True
            self._device.pause_receiving()

    def _message(self, number: int, received_at: float, frame: Frame) -> Message | Reason:
        """The message that a frame is, or why it is refused before any backend sees it."""
        if self._stopping:
            return Reason.STOPPING
        if isinstance(frame, Oversized):
            return Reason.TOO_LONG
        if isinstance(frame, Truncated):
            return Reason.INVALID
        message_id, terms = None, self._terms
        try:
            if terms.has_message_ids:
                message_id, frame = split_message_id(frame)
            check_payload(frame, terms.kind)
        except ValueError:
            return Reason.INVALID
        info = self._info
        return Message(
            info.realm,
            info.device,
            info.identity,
            info.group,
            info.session,
            number,
            received_at,
            frame,
            info.labels,
            message_id,
        )

    def _settled(self, message: Message, reason: Reason | None, reply: bytes | None = None) -> None:
        """The backend has confirmed a frame, or not."""
        number = message.sequence
        self._unconfirmed -= 1
        self._unconfirmed_bytes -= len(message.payload)
        if reason is not None:
            self._terms.log.rejected(reason)
        if self._lost:
            self._go_on_if_room()
        else:
            self._answer(
                number, self._confirmation(number, reply) if reason is None else self._refusal(number, reason)
            )

    def _refusal(self, number: int, reason: Reason) -> bytes:
        return self._terms.encode(encode_error(number, reason))

    def _confirmation(self, number: int, reply: bytes | None) -> bytes:
        """`reply`, or `ok` when there is none or it does not fit: the message is safe either way."""
        if reply:
            try:
                return self._encode_reply(number, reply)
            except ValueError as exc:
                self._terms.log.reply_dropped(str(exc))
        return self._terms.encode(encode_ok(number)) if self._terms.ack else b""

    def _encode_reply(self, number: int, reply: bytes) -> bytes:
        """A line break at the end of a body is no part of what it says: without it the body may fit a line."""
        try:
            return self._terms.encode(encode_reply(number, reply))
        except ValueError:
            return self._terms.encode(encode_reply(number, reply.rstrip(b"\r\n")))

    def _answer(self, number: int, answer: bytes) -> None:
        """Queue the answer to frame `number` (empty: there is none) behind those of all frames before it."""
        if self._lost:
            return
        if number != self._answered + 1:
            if self._early is None:
                self._early = {}
            self._early[number] = answer
            return
        answers = self._answers
        if answers is None:
            self._answers = answers = []
            self._terms.soon(self._flush)
        answers.append(answer)
        while self._early and number + 1 in self._early:
            number += 1
            answers.append(self._early.pop(number))
        self._answered = number

    def _flush(self) -> None:
        """Send the answers that are due, in one record."""
        answers, self._answers = self._answers, None
        if answers is None:  # nobody hears them any more
            return
        if data := b"".join(answers):
            self._device.send(data)
        self._go_on_if_room()
        self._end_if_settled()

    def _end_if_settled(self) -> None:
        if (
            (self._finished or self._stopping)
            and not self._lost
            and self._answered == self._number
            and self._answers is None
            and not self._held
        ):
            self._device.close()
