"""The metrics of several processes as one exposition.

Each process takes a `snapshot` of its registry and sends it to the supervisor, which sums them with `merge` and keeps
what ended processes had counted:

    worker:      snapshot(registry)  --control channel-->  supervisor
    a process ends:   departed = retire(departed, its last snapshot)
    a scrape:         exposition(merge([departed, *latest snapshots]), accept)

Counters and histograms of departed processes stay in the sums, so that a counter never falls because a worker was
replaced; their gauges go with them. `*_created` samples are left out: they would change with every worker life.

All functions are pure; a snapshot is a list of frozen values that msgspec encodes for the channel.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

__all__ = ["Family", "MergedCollector", "Sample", "Snapshot", "exposition", "merge", "retire", "snapshot"]

Labels = tuple[tuple[str, str], ...]
"""Pairs of name and value, sorted by name."""

LASTING_TYPES = frozenset({"counter", "histogram"})
"""Types whose values only grow, and stay when their process ends."""

RULES: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "process_start_time_seconds": min,  # the gateway started with its first process
        "process_max_fds": max,  # a limit per process, the same for all
        "process_open_fds": max,  # of the process that is nearest to its limit: no sum of several says that
        "pskgw_outbox_oldest_seconds": max,
    }
)
"""How values of one sample from two processes become one, where that is not their sum."""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One value, as prometheus_client names it (`..._bucket`, `..._total`, ...)."""

    name: str
    labels: Labels
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric with all its samples."""

    name: str
    type: str
    help: str
    samples: tuple[Sample, ...]


Snapshot = list[Family]


def snapshot(registry: Collector) -> Snapshot:
    """All values of a registry now."""
    return [
        Family(metric.name, metric.type, metric.documentation, tuple(_samples(metric)))
        for metric in registry.collect()
    ]


def _samples(metric: Metric) -> Iterator[Sample]:
    for sample in metric.samples:
        if not (metric.type in LASTING_TYPES and sample.name.endswith("_created")):
            yield Sample(sample.name, tuple(sorted(sample.labels.items())), float(sample.value))


def merge(snapshots: Iterable[Sequence[Family]]) -> Snapshot:
    """One snapshot from those of several processes: samples of the same name and labels become one.

    Families and samples keep the order in which they first appear, and families of one name their first help text.
    """
    families: dict[str, tuple[Family, dict[tuple[str, Labels], float]]] = {}
    for families_of_one in snapshots:
        for family in families_of_one:
            _, values = families.setdefault(family.name, (family, {}))
            _add(values, family)
    return [
        Family(
            first.name, first.type, first.help, tuple(Sample(*key, value) for key, value in values.items())
        )
        for first, values in families.values()
    ]


def _add(values: dict[tuple[str, Labels], float], family: Family) -> None:
    rule = RULES.get(family.name, _sum)
    for sample in family.samples:
        key = (sample.name, sample.labels)
        values[key] = rule(values[key], sample.value) if key in values else sample.value


def _sum(one: float, other: float) -> float:
    return one + other


def retire(departed: Sequence[Family], last: Sequence[Family]) -> Snapshot:
    """The totals of departed processes after one more ended, whose last snapshot this was."""
    return [family for family in merge([departed, last]) if family.type in LASTING_TYPES]


class MergedCollector(Collector):
    """Gives merged families to the writers of prometheus_client."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.type)
            for sample in family.samples:
                metric.add_sample(sample.name, dict(sample.labels), sample.value)
            yield metric


def exposition(families: Sequence[Family], accept: str = "") -> tuple[bytes, str]:
    """The body and content type for a scraper that sends this `Accept` header: OpenMetrics if it asks, else text."""
    encode, content_type = choose_encoder(accept)
    return encode(MergedCollector(families)), content_type
