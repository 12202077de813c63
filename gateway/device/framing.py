"""How a device's frames are told apart, by the names that routes have for it."""

from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.wire.framing import FrameDecoder, LineDecoder, encode_line

__all__ = ["FRAMINGS", "Framing"]


class Framing(NamedTuple):
    """The way to take frames apart and to put one together, the same in both directions."""

    name: str
    decoder: Callable[[int], FrameDecoder]
    """longest frame in bytes -> a decoder for one session"""
    encode: Callable[[bytes], bytes]
    """One frame. Raises ValueError for a content that this framing cannot carry."""


FRAMINGS: Final = {framing.name: framing for framing in (Framing("lines", LineDecoder, encode_line),)}
