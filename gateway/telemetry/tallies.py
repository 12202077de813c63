"""Counters and histograms for what happens per handshake, per record and per message.

Those of prometheus_client take a lock and six calls to add one, for processes with threads; these are for the thread of
one event loop, and are read in it. They stand in the same registry and look the same to a scrape.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

__all__ = ["Tally", "TallyCounter", "TallyHistogram"]


class Tally:
    """One count. Add to its `value` where a call would cost more than what is counted."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Add to it."""
        self.value += amount


class TallyCounter(Collector):
    """A family of counts, one for each set of label values. `name` is without `_total`."""

    _type = "counter"  # this, `_name` and `_labelnames` as prometheus_client's own have them

    def __init__(
        self, name: str, documentation: str, label_names: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labelnames = tuple(label_names)
        self._tallies: dict[tuple[str, ...], Tally] = {}
        registry.register(self)

    def labels(self, *values: str) -> Tally:
        """The count of these label values, in the order of the names. Bind it once, where it is needed."""
        assert len(values) == len(self._labelnames)
        return self._tallies.setdefault(values, Tally())

    def collect(self) -> Iterator[CounterMetricFamily]:
        """As prometheus_client asks."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labelnames)
        for values, tally in self._tallies.items():
            family.add_metric(values, tally.value)
        yield family


class TallyHistogram(Collector):
    """A histogram without labels. `buckets` are the upper bounds, ascending, without infinity."""

    _type = "histogram"
    _labelnames: tuple[str, ...] = ()

    def __init__(
        self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(map(float, buckets))
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As prometheus_client asks."""
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, itertools.accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)
