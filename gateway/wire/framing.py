"""Frames on a framed route: what a device sends taken apart, and what it is told put together.

A decoder is pure and bounded: it holds no more than one frame of `message_bytes_max`, however long a frame the
peer goes on sending. Every frame counts, the refused ones too, so a frame that is too long stands in the result as
`Oversized` at its place, and one that the peer's end cut off as `Truncated`.

The same framing holds both ways: a frame to the device begins with one word (`ok`, `error`, `reply`, `command`), and
`Framing.encode` delimits it.
"""

import enum
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

__all__ = [
    "MESSAGE_ID_BYTES_MAX",
    "Frame",
    "FrameDecoder",
    "Framing",
    "LineDecoder",
    "Oversized",
    "Reason",
    "Truncated",
    "encode_command",
    "encode_error",
    "encode_line",
    "encode_ok",
    "encode_reply",
    "is_message_id",
    "split_message_id",
]


class Oversized(enum.Enum):
    """Stands for one frame that was longer than `message_bytes_max` and was dropped."""

    FRAME = "oversized"


class Truncated(enum.Enum):
    """Stands for one frame that the peer ended in the middle of, in an orderly way."""

    FRAME = "truncated"


Frame = bytes | Oversized | Truncated


class FrameDecoder(Protocol):
    """Bytes in any pieces to frames."""

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that `data` completes, in order."""
        ...

    def finish(self) -> list[Frame]:
        """The frames that are left when the peer has ended its side in an orderly way."""
        ...


class Framing(NamedTuple):
    """How frames are told apart on a connection, both ways."""

    name: str
    decoder: Callable[[int], FrameDecoder]
    """`message_bytes_max` -> a decoder for one session"""
    encode: Callable[[bytes], bytes]
    """One frame to the device. Raises ValueError for a content that this framing cannot carry."""


class LineDecoder:
    """LF ends a frame, one CR before it is removed, an empty line is an empty frame.

    `message_bytes_max` bounds a frame without its line end. A longer one gives `Oversized` at once; the rest of it
    is dropped up to its LF. An unterminated rest is a frame at the end.
    """

    __slots__ = ("_dropping", "_max", "_rest")

    def __init__(self, message_bytes_max: int) -> None:
        self._max = message_bytes_max
        self._rest: bytearray | None = None
        # The unfinished frame: at most one byte over the bound, the CR of its line end. None: there is none.
        self._dropping = False  # the unfinished frame was too long and is answered for

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        lines = bytes(data).split(b"\n")
        rest = lines.pop()
        if not lines:
            return self._hold(rest)
        frames: list[Frame] = []
        if self._dropping:
            self._dropping = False
            del lines[0]
        elif self._rest:
            self._rest += lines[0]
            lines[0] = bytes(self._rest)
            self._rest = None
        bound = self._max
        for line in lines:
            frame = line[:-1] if line.endswith(b"\r") else line
            frames.append(frame if len(frame) <= bound else Oversized.FRAME)
        if rest:
            frames += self._hold(rest)
        return frames

    def finish(self) -> list[Frame]:
        if not self._rest:
            return []
        rest, self._rest = bytes(self._rest), None
        return [rest if len(rest) <= self._max else Oversized.FRAME]

    def _hold(self, rest: bytes) -> list[Frame]:
        """Keep the start of a frame, unless it is already too long."""
        if self._dropping or not rest:
            return []
        held = self._rest = bytearray() if self._rest is None else self._rest
        held += rest
        excess = len(held) - self._max
        if excess <= 0 or (excess == 1 and held.endswith(b"\r")):
            return []
        self._rest = None
        self._dropping = True
        return [Oversized.FRAME]


class Reason(enum.StrEnum):
    """Why a frame is refused: the word in the answer and the label `reason` of pskgw_messages_rejected_total."""

    TOO_LONG = "too_long"
    INVALID = "invalid"
    FULL = "full"
    RATE_LIMITED = "rate_limited"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    STOPPING = "stopping"


# What a device is told. The words alone: `Framing.encode` makes a frame of them.


def encode_ok(number: int) -> bytes:
    """Frame `number` of the session, counted from 1, is safe."""
    return b"ok %d" % number


def encode_error(number: int, reason: Reason) -> bytes:
    """Frame `number` of the session, counted from 1, is refused."""
    return b"error %d %b" % (number, reason.encode())


def encode_reply(number: int, body: bytes) -> bytes:
    """Frame `number` is safe, and this is what the backend says to it."""
    return b"reply %d %b" % (number, body)


def encode_command(command_id: str, payload: bytes) -> bytes:
    """A command; the same id twice is the same command."""
    return b"command %b %b" % (command_id.encode("ascii"), payload)


def encode_line(content: bytes) -> bytes:
    """One line. Raises ValueError for a content with a line break, which would be two."""
    if b"\n" in content or b"\r" in content:
        raise ValueError("a line break does not fit on a route with framing = lines")
    return content + b"\n"


# Ids that devices give to their messages

MESSAGE_ID_BYTES_MAX: Final = 64
"""Room for a UUID with a prefix; it stands in every event and in headers of brokers."""
_VISIBLE_ASCII: Final = bytes(range(0x21, 0x7F))


def split_message_id(frame: bytes) -> tuple[str, bytes]:
    """The id and the payload of a frame `ID PAYLOAD`, separated by one space.

    Raises ValueError when there is no space, or the id is empty, longer than 64 bytes, or has a character outside of
    visible ASCII (0x21 to 0x7E): an id goes into headers as it is.
    """
    token, space, payload = frame.partition(b" ")
    if not space or not _is_id(token):
        raise ValueError(
            "the frame does not begin with an id of 1 to 64 visible ASCII characters and a space"
        )
    return token.decode("ascii"), payload


def is_message_id(text: str) -> bool:
    """Whether a text can be an id: 1 to 64 characters of visible ASCII."""
    return text.isascii() and _is_id(text.encode())


def _is_id(token: bytes) -> bool:
    return 0 < len(token) <= MESSAGE_ID_BYTES_MAX and not token.translate(None, _VISIBLE_ASCII)
