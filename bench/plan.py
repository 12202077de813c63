"""What is measured, and how much of it: the cases, and the two sizes of a run."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Suite:
    """A cipher suite as the tables call it and as OpenSSL does."""

    label: str
    name: str


PSK_GCM = Suite("TLS 1.2 PSK-AES128-GCM-SHA256", "PSK-AES128-GCM-SHA256")
ECDHE_CHACHA = Suite("TLS 1.2 ECDHE-PSK-CHACHA20-POLY1305", "ECDHE-PSK-CHACHA20-POLY1305")
TLS13_GCM = Suite("TLS 1.3 AES-128-GCM, psk_dhe_ke", "TLS_AES_128_GCM_SHA256")
SUITES = (PSK_GCM, ECDHE_CHACHA, TLS13_GCM)


class Work(enum.Enum):
    """What one connection does."""

    HANDSHAKE = "connect + handshake + close"
    LINE = "connect + handshake + one acknowledged line of 64 bytes + close"


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a kind of work, under load of so many clients at a time."""

    work: Work
    suite: Suite
    clients: int
    connections: int = field(compare=False)
    """Per round."""
    target: float | None = field(default=None, compare=False)
    """Most that the gateway may take, as a multiple of what the peer takes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a run.

    Connections are few with one client, where each waits for the scheduler, and many with 64, where the figures
    of the targets are taken. In the full size all rounds together stay below the devices of the registry, so that
    no device is seen twice.
    """

    name: str
    rounds: int
    devices: int
    """Devices in the gateway's registry."""
    connections: tuple[tuple[int, int], ...]
    """Clients at a time, and connections per round with so many."""
    lines: int
    """Connections per round that also send a line, with 64 clients."""
    warm_up: int
    """Connections per peer and suite that are not measured."""
    memory_rounds: int
    memory_sessions: int = 1000
    peer_devices: int = 1000
    """Lines of the peer's psk_file."""

    def cases(self) -> Iterator[Case]:
        for suite in SUITES:
            for clients, connections in self.connections:
                target = 1.0 if suite is PSK_GCM and clients == 64 else None
                yield Case(Work.HANDSHAKE, suite, clients, connections, target)
        yield Case(Work.LINE, PSK_GCM, 64, self.lines)


FULL = Plan(
    name="full",
    rounds=5,
    devices=1_000_000,
    connections=((1, 2000), (8, 8000), (64, 20_000)),
    lines=10_000,
    warm_up=1000,
    memory_rounds=3,
)
QUICK = Plan(
    name="quick",
    rounds=5,
    devices=10_000,
    connections=((1, 300), (8, 1000), (64, 2000)),
    lines=1000,
    warm_up=300,
    memory_rounds=1,
)
MEMORY_TARGET_BYTES = 24 * 1024
"""Per idle TLS 1.2 session."""
