"""One frame of a device on its way to a backend."""

from typing import Final

import msgspec

from gateway.wire.cloudevents import PayloadKind, encode_event, event_id, event_source

__all__ = ["UUID7_RANDOM_BITS", "Message", "encode_message", "uuid7"]


class Message(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A frame with what the gateway knows about it.

    `session` is a UUIDv7 as text, `sequence` the number of the frame in it, counted from 1, `received_at` Unix
    seconds. (session, sequence) sorts the messages of a device. `labels` are the device's when it connected,
    `message_id` is the device's own name for the message, where the route reads one.

    Spools store it as an array: a new field goes to the end and has a default.
    """

    realm: str
    device: str
    identity: str
    group: str | None
    session: str
    sequence: int
    received_at: float
    payload: bytes
    labels: dict[str, str] = {}
    message_id: str | None = None

    @property
    def event_id(self) -> str:
        return event_id(self.session, self.sequence) if self.message_id is None else self.message_id

    @property
    def source(self) -> str:
        return event_source(self.realm, self.device)


def encode_message(message: Message, content_type: str, kind: PayloadKind) -> bytes:
    """The message as one structured CloudEvent, without a line break."""
    return encode_event(
        session=message.session,
        sequence=message.sequence,
        realm=message.realm,
        device=message.device,
        received_at=message.received_at,
        content_type=content_type,
        kind=kind,
        payload=message.payload,
        message_id=message.message_id,
    )


UUID7_RANDOM_BITS: Final = 62


def uuid7(now_s: float, randomness: int) -> str:
    """A UUID version 7 (RFC 9562 section 5.7) from Unix seconds and UUID7_RANDOM_BITS random bits.

    The 12 bits after the milliseconds hold their fraction (section 6.2, method 3), so that two sessions which a
    device opens within a millisecond still sort in order.
    """
    ticks = int(now_s * 4_096_000)  # 4096 to the millisecond
    ms = ticks >> 12
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031 - a third less than an f-string takes
        ms >> 16,
        ms & 0xFFFF,
        ticks & 0xFFF,
        0x8000 | randomness >> 48,
        randomness & 0xFFFF_FFFF_FFFF,
    )
