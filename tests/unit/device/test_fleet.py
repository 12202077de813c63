"""What a fleet counts, and how a plan is shared out."""

import itertools

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from gateway.device.fleet import FleetPlan
from gateway.device.fleet_processes import split_plan
from gateway.device.fleet_report import FleetReport, Latencies, prometheus_text


def test_quantiles_are_within_a_bucket() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.5) is None
    for milliseconds in range(1, 1001):
        latencies.observe(milliseconds / 1000)
    for share in (0.01, 0.5, 0.9, 0.99):
        found = latencies.quantile(share)
        assert found is not None
        assert share / 1.25 <= found <= share * 1.25
    assert latencies.quantile(1) == latencies.longest_s == 1.0
    latencies.observe(1000)
    assert latencies.quantile(1) == 1000


def test_a_sum_over_processes_is_the_whole() -> None:
    one = FleetReport(devices=2, sessions=1, refused={"full": 1}, handshakes_failed={"a": 1})
    two = FleetReport(devices=3, sessions=2, refused={"full": 2, "invalid": 1}, cpu_s=0.5)
    one.answer.observe(0.001)
    two.answer.observe(0.1)
    total = FleetReport.sum([one, msgspec.json.decode(msgspec.json.encode(two), type=FleetReport)])
    assert (total.devices, total.sessions, total.cpu_s) == (5, 3, 0.5)
    assert total.refused == {"full": 3, "invalid": 1}
    assert total.handshakes_failed == {"a": 1}
    assert sum(total.answer.counts) == 2
    assert total.answer.longest_s == 0.1
    assert one.refused == {"full": 1}


def test_the_text_for_prometheus_parses() -> None:
    report = FleetReport(handshakes=3, handshakes_failed={'it said "no"': 1}, messages=7, refused={"full": 2})
    report.answer.observe(0.002)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(prometheus_text(report).decode())
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert samples["pskgw_simulate_handshakes_total", "ok"] == 3
    assert samples["pskgw_simulate_handshakes_total", 'it said "no"'] == 1
    assert samples["pskgw_simulate_messages_total",] == 7
    assert samples["pskgw_simulate_answer_seconds_count",] == 1


def test_a_plan_is_shared_out_whole() -> None:
    devices = tuple((f"d{number}", "00" * 16) for number in range(10))
    plan = FleetPlan("h", 1, devices, arrivals_per_s=30, bad={"slow": 4, "unknown": 1})
    shares = split_plan(plan, 3)
    assert sorted(itertools.chain.from_iterable(share.devices for share in shares)) == sorted(devices)
    assert sum(share.arrivals_per_s for share in shares) == 30
    assert [share.bad for share in shares] == [{"slow": 2, "unknown": 1}, {"slow": 1}, {"slow": 1}]
    assert len(split_plan(FleetPlan("h", 1, devices[:2]), 8)) == 2
