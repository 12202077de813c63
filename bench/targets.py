"""The targets: what each figure is held to. A target that is missed keeps its row."""

import statistics
from dataclasses import dataclass

from bench.cases.changes import ADDED, REVOKED
from bench.cases.handshake import MANY_LINES
from bench.cases.memory import FRAMED, FRESH, MOVED
from bench.cases.stream import BULK, CONNECT, TRIPS
from bench.figures import FIGURES
from bench.imports import SQLITE
from bench.messages import SUBSCRIBED
from bench.node import GATEWAY
from bench.peers import MOSQUITTO, STUNNEL
from bench.plan import SUITES
from bench.result import Result, Series, ratios

__all__ = ["TARGETS", "Target", "Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target beside what was measured."""

    gateway: str
    peer: str
    measured: str
    """What is held against the bound"""
    word: str


@dataclass(frozen=True, slots=True)
class Target:
    """At most so much of a peer's figure; or so much itself, without a peer."""

    what: str
    case: str
    row: str
    figure: str
    most: float
    peer: str | None = None
    server: str = GATEWAY
    at: int | None = None
    """None: the largest that was measured"""

    def bound(self) -> str:
        if self.peer is not None:
            return f"<= {self.most:.1f}x"
        figure = FIGURES[self.figure]
        return f"<= {figure.text(self.most)} {figure.unit}"

    def verdict(self, result: Result) -> Verdict | None:
        """None when the result lacks it."""
        own = self._find(result, self.server)
        value = own.median(self.figure) if own is not None else None
        if own is None or value is None:
            return None
        gateway = FIGURES[self.figure].spread(own.figures[self.figure])
        if self.peer is None:
            return Verdict(gateway, "-", gateway, self._word(value))
        peer = self._find(result, self.peer, own.at)
        quotients = ratios(own, peer, self.figure) if peer is not None else []
        if peer is None or not quotients:
            return None
        theirs = FIGURES[self.figure].spread(peer.figures[self.figure])
        ratio = statistics.median(quotients)
        return Verdict(gateway, theirs, spread_of_ratios(quotients), self._word(ratio))

    def _word(self, value: float) -> str:
        return "met" if value <= self.most else "missed"

    def _find(self, result: Result, server: str, at: int | None = None) -> Series | None:
        at = at if at is not None else self.at
        found = [s for s in result.series if s.row == self.row and s.server == server and at in {None, s.at}]
        return max(found, key=lambda series: series.at, default=None)


def spread_of_ratios(quotients: list[float]) -> str:
    middle = f"{statistics.median(quotients):.2f}x"
    return f"{middle} ({min(quotients):.2f}-{max(quotients):.2f})" if len(quotients) > 1 else middle


TARGETS = (
    *(
        Target(
            f"connect + handshake + close, {suite.label}, 64 clients",
            "handshake",
            suite.label,
            "cpu_us",
            most,
            peer,
            at=64,
        )
        for peer, most in ((MOSQUITTO, 1.0), (MANY_LINES, 0.2))
        for suite in SUITES
    ),
    *(
        Target(
            f"connect + handshake + 64 bytes echoed + close, {suite.label}, 64 clients",
            "stream",
            CONNECT.format(suite.label),
            "cpu_us",
            0.2,
            STUNNEL,
            at=64,
        )
        for suite in SUITES
    ),
    Target("100-byte round trips on 50 open connections", "stream", TRIPS, "trip_us", 0.5, STUNNEL),
    Target("1 GB in 16 KiB writes, echoed", "stream", BULK, "gb_s", 0.4, STUNNEL),
    Target("idle session, fresh", "memory", FRESH, "session_kib", 24, server=FRAMED),
    Target("idle session after 64 KB both ways", "memory", MOVED, "session_kib", 24, server=FRAMED),
    *(
        Target(
            f"message of 100 bytes, {route}, 64 clients",
            "messages",
            "100 bytes",
            "message_us",
            1.0,
            SUBSCRIBED,
            server=route,
            at=64,
        )
        for route in ("spooled-file", "spooled-http")
    ),
    Target("import of 1,000,000 devices, time", "import", SQLITE, "import_s", 120, at=1_000_000),
    Target("import of 1,000,000 devices, memory", "import", SQLITE, "resident_mib", 286, at=1_000_000),
    Target(REVOKED, "changes", REVOKED, "felt_s", 1.0),
    Target(ADDED, "changes", ADDED, "felt_s", 1.0),
)
"""300 MB are 286 MiB. The two other suites are held to what is promised for PSK-AES128-GCM-SHA256."""
