"""What a follower tells the workers of its node. Made to be sent: msgspec encodes and decodes `Notice` as it is."""

import msgspec

from gateway.registry.records import CredentialRecord

__all__ = ["Changed", "IdRanges", "Notice", "Overlay", "Published"]

IdRanges = tuple[tuple[int, int], ...]
"""Ranges of ids, both ends included, ascending and apart."""

Overlay = dict[bytes, CredentialRecord | None]
"""What stands before the replica, by `records.identity_key`; None: there is no such credential."""


class Published(msgspec.Struct, frozen=True, tag="published"):
    """A new generation at `path`: open it in place of the old one, drop the overlay, check every live session."""

    path: str
    sequence: int


class Changed(msgspec.Struct, frozen=True, tag="changed"):
    """The registry changed, and this is its state at `sequence`.

    Live sessions of the devices in these ranges are to be checked again; with `realms`, realms were added or their
    hints changed. `committed_at` is when the oldest of these changes was committed (Unix s). The overlay is all that
    the replica lacks, nearly always nothing, and takes the place of the one before.
    """

    sequence: int
    devices: IdRanges
    realms: bool
    committed_at: float
    overlay: Overlay


Notice = Published | Changed
