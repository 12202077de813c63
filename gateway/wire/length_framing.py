"""Frames behind a length: 2 or 4 bytes, big-endian, then as many bytes of content.

A length above `message_bytes_max` is answered for at once; its bytes are counted off as they come and never held, so a
prefix that promises 4 GB costs nothing. After them the next frame is read as usual: a device that sent one frame too
many does not lose the session.
"""

import functools
from collections.abc import Callable

from gateway.wire.framing import Frame, Oversized, Truncated

__all__ = ["LengthDecoder", "encode_length", "length_decoder", "length_encoder"]


class LengthDecoder:
    """Frames behind a prefix of `prefix_bytes`. Holds the unfinished prefix or frame, at most `message_bytes_max`."""

    __slots__ = ("_held", "_max", "_missing", "_prefix_bytes", "_skip")

    def __init__(self, prefix_bytes: int, message_bytes_max: int) -> None:
        self._prefix_bytes = prefix_bytes
        self._max = message_bytes_max
        self._held = bytearray()  # of a prefix while nothing is missing, else of a frame
        self._missing = 0  # bytes that the unfinished frame still lacks
        self._skip = 0  # bytes of a frame that was too long and is answered for

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that `data` completes, in order."""
        view = memoryview(data)
        end = len(view)
        at = 0
        frames: list[Frame] = []
        while at < end:
            if self._skip:
                dropped = min(self._skip, end - at)
                self._skip -= dropped
                at += dropped
            elif self._missing:
                part = view[at : at + self._missing]
                self._held += part
                self._missing -= len(part)
                at += len(part)
                if not self._missing:
                    frames.append(self._release())
            elif self._held or end - at < self._prefix_bytes:
                part = view[at : at + self._prefix_bytes - len(self._held)]
                self._held += part
                at += len(part)
                if len(self._held) == self._prefix_bytes:
                    frames += self._begin(int.from_bytes(self._release(), "big"))
            else:
                length = int.from_bytes(view[at : at + self._prefix_bytes], "big")
                at += self._prefix_bytes
                if length <= self._max and length <= end - at:  # nearly always
                    frames.append(bytes(view[at : at + length]))
                    at += length
                else:
                    frames += self._begin(length)
        return frames

    def finish(self) -> list[Frame]:
        """A prefix or frame that the peer ended in the middle of; one that was too long is answered for already."""
        cut = bool(self._held or self._missing)
        self._held.clear()
        self._missing = self._skip = 0
        return [Truncated.FRAME] if cut else []

    def _begin(self, length: int) -> list[Frame]:
        """A prefix says that `length` bytes follow."""
        if length > self._max:
            self._skip = length
            return [Oversized.FRAME]
        self._missing = length
        return [] if length else [b""]

    def _release(self) -> bytes:
        held = bytes(self._held)
        self._held.clear()
        return held


def encode_length(prefix_bytes: int, content: bytes) -> bytes:
    """One frame. Raises ValueError for a content that the prefix cannot count."""
    length = len(content)
    if length >> (8 * prefix_bytes):
        raise ValueError(
            f"{length} bytes do not fit on a route with framing = length{8 * prefix_bytes}: "
            f"{(1 << 8 * prefix_bytes) - 1} do"
        )
    return length.to_bytes(prefix_bytes, "big") + content


def length_decoder(prefix_bytes: int) -> Callable[[int], LengthDecoder]:
    """Decoders of one framing: `message_bytes_max` -> decoder."""
    return functools.partial(LengthDecoder, prefix_bytes)


def length_encoder(prefix_bytes: int) -> Callable[[bytes], bytes]:
    """The encoder of one framing."""
    return functools.partial(encode_length, prefix_bytes)
