"""The fleet of the benchmarks: numbered devices whose keys both ends derive. load.c derives the same.

Identity of device N: `dev-%07d`. Its key: SHA-256("bench" || identity), all 32 bytes.
"""

import hashlib
from pathlib import Path


def identity(number: int) -> str:
    return f"dev-{number:07d}"


def key(device_identity: str) -> bytes:
    return hashlib.sha256(b"bench" + device_identity.encode()).digest()


def write_psk_file(path: Path, devices: int) -> None:
    """The first `devices` of the fleet in Mosquitto's format, `identity:hex key` per line."""
    with path.open("w", encoding="ascii") as lines:
        for number in range(devices):
            name = identity(number)
            lines.write(f"{name}:{key(name).hex()}\n")
    path.chmod(0o600)
