"""The table of framings of messages. `stream` and `mqtt` carry bytes and have none."""

from typing import Final

from gateway.wire.framing import Framing, LineDecoder, encode_line
from gateway.wire.length_framing import length_decoder, length_encoder

__all__ = ["FRAMINGS"]

FRAMINGS: Final = {
    framing.name: framing
    for framing in (
        Framing("lines", LineDecoder, encode_line),
        Framing("length16", length_decoder(2), length_encoder(2)),
        Framing("length32", length_decoder(4), length_encoder(4)),
    )
}
