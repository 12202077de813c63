"""Tallies look to a scrape as the metrics of prometheus_client do."""

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from gateway.telemetry.aggregate import exposition, snapshot
from gateway.telemetry.tallies import TallyCounter, TallyHistogram

BUCKETS = (0.001, 0.5, 1, 10)


def exposed(fill: Callable[[CollectorRegistry], None]) -> bytes:
    registry = CollectorRegistry()
    fill(registry)
    return exposition(snapshot(registry))[0]


def test_a_counter_is_exposed_as_prometheus_clients_own() -> None:
    def tallies(registry: CollectorRegistry) -> None:
        counter = TallyCounter("things", "Things.", ["kind", "place"], registry)
        counter.labels("a", "x").inc()
        counter.labels("b", "x").inc(41)
        counter.labels("b", "x").inc()

    def originals(registry: CollectorRegistry) -> None:
        counter = Counter("things", "Things.", ["kind", "place"], registry=registry)
        counter.labels("a", "x").inc()
        counter.labels("b", "x").inc(42)

    assert exposed(tallies) == exposed(originals)


@pytest.mark.parametrize("values", [(), (0.0, 0.001, 0.0011, 0.5, 9.9, 10, 10.1, 1e9)])
def test_a_histogram_is_exposed_as_prometheus_clients_own(values: tuple[float, ...]) -> None:
    def fill(observe: Callable[[float], None]) -> None:
        for value in values:
            observe(value)

    def tallies(registry: CollectorRegistry) -> None:
        fill(TallyHistogram("taken_seconds", "Taken.", BUCKETS, registry).observe)

    def originals(registry: CollectorRegistry) -> None:
        fill(Histogram("taken_seconds", "Taken.", buckets=BUCKETS, registry=registry).observe)

    assert exposed(tallies) == exposed(originals)
