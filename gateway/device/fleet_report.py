"""What a simulated fleet counts: values that processes send each other and that add up.

Latencies are kept in histograms of geometric buckets, so that a quantile over processes is as good as one of a single
process: exact to a quarter of its value, which is enough to tell 2 ms from 20 ms.
"""

import bisect
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["FleetReport", "Latencies", "prometheus_text"]

_FIRST_S: Final = 100e-6
_FACTOR: Final = 1.25
_BUCKETS: Final = 64
BOUNDS_S: Final = tuple(_FIRST_S * _FACTOR**number for number in range(_BUCKETS))
"""Upper bounds of the buckets, 100 us to two minutes; the last bucket has none."""


class Latencies(msgspec.Struct):
    """How long things took."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (_BUCKETS + 1))
    sum_s: float = 0.0
    longest_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds
        self.longest_s = max(self.longest_s, seconds)

    def add(self, other: "Latencies") -> None:
        """Those of another process."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s
        self.longest_s = max(self.longest_s, other.longest_s)

    def quantile(self, share: float) -> float | None:
        """Seconds below which this share lies, None when nothing was observed."""
        total = sum(self.counts)
        if not total:
            return None
        rank = share * total
        seen = 0
        for number, count in enumerate(self.counts):
            if count and seen + count >= rank:
                lower = BOUNDS_S[number - 1] if number else 0.0
                upper = BOUNDS_S[number] if number < _BUCKETS else self.longest_s
                return min(self.longest_s, lower + (upper - lower) * (rank - seen) / count)
            seen += count
        return self.longest_s


class FleetReport(msgspec.Struct):
    """Of one process, or of all of them."""

    devices: int = 0
    sessions: int = 0
    """Open now."""
    sessions_max: int = 0
    """Open at the same time, at most; of several processes the sum of each one's most."""
    handshakes: int = 0
    handshakes_failed: dict[str, int] = msgspec.field(default_factory=dict)
    """By what it said, addresses left out."""
    sessions_ended: int = 0
    """By the devices: churn, and the end of the run."""
    sessions_cut: int = 0
    """By anybody else."""
    messages: int = 0
    message_bytes: int = 0
    acknowledged: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    unanswered: int = 0
    """Lost with their connection, or never answered."""
    held_back: int = 0
    """Messages that were due and not sent, because the gateway did not read."""
    bad: dict[str, int] = msgspec.field(default_factory=dict)
    """Tries of bad actors that were turned away, by kind."""
    bad_admitted: int = 0
    """Bad actors that got in."""
    handshake: Latencies = msgspec.field(default_factory=Latencies)
    """Name, connection and TLS."""
    answer: Latencies = msgspec.field(default_factory=Latencies)
    """From a message to its answer."""
    cpu_s: float = 0.0
    """Of the simulation itself."""
    memory_bytes: int = 0
    """Resident, of the simulation itself."""

    @classmethod
    def sum(cls, reports: "Iterable[FleetReport]") -> "FleetReport":
        """All of them as one."""
        total = cls()
        for report in reports:
            for name in cls.__struct_fields__:
                mine, its = getattr(total, name), getattr(report, name)
                if isinstance(mine, Latencies):
                    mine.add(its)
                elif isinstance(mine, dict):
                    for key, count in its.items():
                        mine[key] = mine.get(key, 0) + count
                else:
                    setattr(total, name, mine + its)
        return total


class _Families(Collector):
    """The report as Prometheus has it."""

    def __init__(self, report: FleetReport) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report
        for name, what, value in (
            ("sessions", "Sessions open.", report.sessions),
            ("devices", "Devices of the fleet.", report.devices),
            ("memory_bytes", "Resident memory of the simulation.", report.memory_bytes),
        ):
            yield GaugeMetricFamily(f"pskgw_simulate_{name}", what, value)
        for name, what, count in (
            ("sessions_cut", "Sessions that somebody else ended.", report.sessions_cut),
            ("messages", "Messages sent.", report.messages),
            ("message_bytes", "Bytes of their payload.", report.message_bytes),
            ("acknowledged", "Messages acknowledged.", report.acknowledged),
            ("unanswered", "Messages without an answer.", report.unanswered),
            ("bad_admitted", "Bad actors that got in.", report.bad_admitted),
            ("cpu_seconds", "CPU time of the simulation.", report.cpu_s),
        ):
            yield CounterMetricFamily(f"pskgw_simulate_{name}", what, count)
        for name, what, label, values in (
            ("handshakes", "Handshakes.", "outcome", {"ok": report.handshakes, **report.handshakes_failed}),
            ("refused", "Messages refused.", "reason", report.refused),
            ("bad", "Tries of bad actors that were turned away.", "kind", report.bad),
        ):
            family = CounterMetricFamily(f"pskgw_simulate_{name}", what, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family
        for name, what, latencies in (
            ("handshake_seconds", "From the connection to the end of the handshake.", report.handshake),
            ("answer_seconds", "From a message to its answer.", report.answer),
        ):
            yield HistogramMetricFamily(
                f"pskgw_simulate_{name}", what, buckets=_cumulative(latencies), sum_value=latencies.sum_s
            )


def _cumulative(latencies: Latencies) -> list[tuple[str, float]]:
    total = 0
    buckets = []
    for bound, count in zip((*map(repr, BOUNDS_S), "+Inf"), latencies.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def prometheus_text(report: FleetReport) -> bytes:
    """The report in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(report))
    return generate_latest(registry)
