"""A capture file, as tcpdump writes one, of what a `WireTap` saw."""

import struct
from collections.abc import Sequence
from pathlib import Path

from tests.support.peers import Side

__all__ = ["write_pcap"]

LINKTYPE_RAW = 101
SEGMENT_BYTES_MAX = 1400
DEVICE, GATEWAY = (bytes([192, 0, 2, 1]), 40_000), (bytes([192, 0, 2, 2]), 8883)


def write_pcap(path: Path, pieces: Sequence[tuple[Side, bytes]]) -> None:
    """Write TCP segments, from a device at 192.0.2.1 to port 8883 and back, in the order of `pieces`."""
    sent = {"device": 1, "gateway": 1}
    packets = [_packet("device", 0, 0, b"", 0x02), _packet("gateway", 0, 1, b"", 0x12)]
    for side, piece in pieces:
        other = "gateway" if side == "device" else "device"
        for start in range(0, len(piece), SEGMENT_BYTES_MAX):
            data = piece[start : start + SEGMENT_BYTES_MAX]
            packets.append(_packet(side, sent[side], sent[other], data, 0x18))
            sent[side] += len(data)
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, LINKTYPE_RAW))
        for number, packet in enumerate(packets):
            file.write(struct.pack("<IIII", 1_700_000_000, number, len(packet), len(packet)) + packet)


def _packet(side: Side, sequence: int, acknowledged: int, data: bytes, flags: int) -> bytes:
    (source, source_port), (target, target_port) = (
        (DEVICE, GATEWAY) if side == "device" else (GATEWAY, DEVICE)
    )
    tcp = struct.pack(
        ">HHIIBBHHH", source_port, target_port, sequence, acknowledged, 5 << 4, flags, 65_535, 0, 0
    )
    size = 20 + len(tcp) + len(data)
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, size, 0, 0, 64, 6, 0, source, target) + tcp + data
