import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway.telemetry.aggregate import Family, Snapshot, exposition, merge, retire, snapshot


class Process:
    """A process with one metric of each type."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter("events", "Events.", ["route"], registry=self.registry)
        self.duration = Histogram("duration_seconds", "Durations.", buckets=(0.1, 1), registry=self.registry)
        self.open = Gauge("open", "Open things.", registry=self.registry)

    def snapshot(self) -> Snapshot:
        return snapshot(self.registry)


def values(families: Snapshot) -> dict[str, float]:
    """Sample values by their name with labels, as an exposition writes them."""
    return {
        sample.name + "".join(f"|{name}={value}" for name, value in sample.labels): sample.value
        for family in families
        for sample in family.samples
    }


def gauge(name: str, value: float) -> Snapshot:
    registry = CollectorRegistry()
    Gauge(name, "Help.", registry=registry).set(value)
    return snapshot(registry)


def test_a_snapshot_has_all_values_and_no_creation_times() -> None:
    process = Process()
    process.events.labels("a").inc(3)
    process.duration.observe(0.5)
    process.open.set(7)

    assert values(process.snapshot()) == {
        "events_total|route=a": 3,
        "duration_seconds_bucket|le=0.1": 0,
        "duration_seconds_bucket|le=1.0": 1,
        "duration_seconds_bucket|le=+Inf": 1,
        "duration_seconds_count": 1,
        "duration_seconds_sum": 0.5,
        "open": 7,
    }


def test_counters_histograms_and_gauges_are_summed_by_label() -> None:
    one, other = Process(), Process()
    one.events.labels("a").inc(1)
    other.events.labels("a").inc(2)
    other.events.labels("b").inc(4)
    one.duration.observe(0.05)
    other.duration.observe(0.5)
    one.open.set(10)
    other.open.set(20)

    merged = values(merge([one.snapshot(), other.snapshot()]))

    assert merged["events_total|route=a"] == 3
    assert merged["events_total|route=b"] == 4
    assert merged["duration_seconds_bucket|le=0.1"] == 1
    assert merged["duration_seconds_bucket|le=+Inf"] == 2
    assert merged["duration_seconds_sum"] == pytest.approx(0.55)
    assert merged["open"] == 30


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("process_start_time_seconds", 100),
        ("process_max_fds", 300),
        ("process_open_fds", 300),
        ("process_resident_memory_bytes", 400),
    ],
)
def test_process_metrics_have_their_rules(name: str, expected: float) -> None:
    assert values(merge([gauge(name, 300), gauge(name, 100)])) == {name: expected}


def test_what_one_process_has_alone_stands_as_it_is() -> None:
    assert values(merge([gauge("revision", 5), Process().snapshot()]))["revision"] == 5


def test_merging_nothing_and_merging_one_change_nothing() -> None:
    one = Process().snapshot()
    assert merge([]) == []
    assert merge([one]) == one


def test_departed_processes_stay_in_counters_and_histograms_only() -> None:
    departed: Snapshot = []
    for _ in range(2):
        process = Process()
        process.events.labels("a").inc(5)
        process.duration.observe(0.5)
        process.open.set(9)
        departed = retire(departed, process.snapshot())
    survivor = Process()
    survivor.events.labels("a").inc(1)
    survivor.open.set(2)

    merged = values(merge([departed, survivor.snapshot()]))

    assert merged["events_total|route=a"] == 11
    assert merged["duration_seconds_count"] == 2
    assert merged["open"] == 2


def test_a_snapshot_survives_the_control_channel() -> None:
    process = Process()
    process.events.labels('odd "label"\n').inc()
    taken = process.snapshot()

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(taken), type=list[Family]) == taken


def test_the_text_exposition_parses_to_what_was_counted() -> None:
    process = Process()
    process.events.labels('odd "label" \\').inc(2)
    process.duration.observe(0.5)

    body, content_type = exposition(merge([process.snapshot(), Process().snapshot()]))

    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parse_text(body.decode())}
    assert {name: family.type for name, family in families.items()} == {
        "events": "counter",
        "duration_seconds": "histogram",
        "open": "gauge",
    }
    (sample,) = families["events"].samples
    assert sample.name == "events_total"
    assert sample.labels == {"route": 'odd "label" \\'}
    assert sample.value == 2


def test_the_openmetrics_exposition_parses_too() -> None:
    process = Process()
    process.events.labels("a").inc(2)

    body, content_type = exposition(process.snapshot(), "application/openmetrics-text; version=1.0.0")

    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    parsed = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]  # prometheus_client has it untyped
    families = {family.name: family for family in parsed}
    assert [sample.value for sample in families["events"].samples] == [2]
