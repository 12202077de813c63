"""Frames on a framed route: what a device sends taken apart, and what it is answered put together.

A decoder is pure and bounded: it holds no more than one frame of `message_bytes_max`, however long a frame the
peer goes on sending. Every frame counts, the refused ones too, so a frame that is too long stands in the result as
`Oversized` at its place.
"""

import enum
from typing import Protocol

__all__ = [
    "Frame",
    "FrameDecoder",
    "LineDecoder",
    "Oversized",
    "Reason",
    "encode_error",
    "encode_line",
    "encode_ok",
]


class Oversized(enum.Enum):
    """Stands for one frame that was longer than `message_bytes_max` and was dropped."""

    FRAME = "oversized"


Frame = bytes | Oversized


class FrameDecoder(Protocol):
    """Bytes in any pieces to frames."""

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that `data` completes, in order."""
        ...

    def finish(self) -> list[Frame]:
        """The frames that are left when the peer has ended its side in an orderly way."""
        ...


class LineDecoder:
    """LF ends a frame, one CR before it is removed, an empty line is an empty frame.

    `message_bytes_max` bounds a frame without its line end. A longer one gives `Oversized` at once; the rest of it
    is dropped up to its LF. An unterminated rest is a frame at the end.
    """

    __slots__ = ("_dropping", "_max", "_rest")

    def __init__(self, message_bytes_max: int) -> None:
        self._max = message_bytes_max
        self._rest = (
            bytearray()
        )  # the unfinished frame: at most one byte over the bound, the CR of its line end
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
            self._rest.clear()
        bound = self._max
        for line in lines:
            frame = line[:-1] if line.endswith(b"\r") else line
            frames.append(frame if len(frame) <= bound else Oversized.FRAME)
        if rest:
            frames += self._hold(rest)
        return frames

    def finish(self) -> list[Frame]:
        rest = bytes(self._rest)
        self._rest.clear()
        if not rest:
            return []
        return [rest if len(rest) <= self._max else Oversized.FRAME]

    def _hold(self, rest: bytes) -> list[Frame]:
        """Keep the start of a frame, unless it is already too long."""
        if self._dropping or not rest:
            return []
        held = self._rest
        held += rest
        excess = len(held) - self._max
        if excess <= 0 or (excess == 1 and held.endswith(b"\r")):
            return []
        held.clear()
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


def encode_ok(number: int) -> bytes:
    """Frame `number` of the session, counted from 1, is safe."""
    return b"ok %d\n" % number


def encode_error(number: int, reason: Reason) -> bytes:
    """Frame `number` of the session, counted from 1, is refused."""
    return b"error %d %b\n" % (number, reason.encode())


def encode_line(payload: bytes) -> bytes:
    """One frame to the device. Raises ValueError for a payload with a line break, which would be two."""
    if b"\n" in payload or b"\r" in payload:
        raise ValueError("a payload with a line break does not fit a route with framing = lines")
    return payload + b"\n"
