from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.aggregate import exposition, merge, snapshot
from gateway.telemetry.metrics import FollowerMetrics, Lookup, Outcome, SupervisorMetrics, WorkerMetrics

CONTRACT = {
    "pskgw_build_info": {"version", "python", "openssl"},
    "pskgw_handshakes": {"listener", "outcome", "tls_version", "cipher"},
    "pskgw_handshake_duration_seconds": set(),
    "pskgw_connections": {"listener"},
    "pskgw_tasks": set(),
    "pskgw_lookups": {"result"},
    "pskgw_lookup_duration_seconds": set(),
    "pskgw_received_bytes": {"route"},
    "pskgw_sent_bytes": {"route"},
    "pskgw_messages_received": {"route"},
    "pskgw_messages_delivered": {"route", "backend"},
    "pskgw_messages_rejected": {"route", "reason"},
    "pskgw_backend_duration_seconds": {"backend", "outcome"},
    "pskgw_registry_revision": set(),
    "pskgw_registry_age_seconds": set(),
    "pskgw_revocation_seconds": set(),
    "pskgw_credentials": {"state"},
    "pskgw_devices_expiring": set(),
    "pskgw_workers": {"state"},
    "pskgw_process_restarts": {"process"},
    "pskgw_enrolments": {"outcome"},
    "pskgw_replies_dropped": {"route"},
    "pskgw_commands": {"outcome"},
    "pskgw_config_reloads": {"outcome"},
    "pskgw_config_last_reload_successful": set(),
    "pskgw_config_last_reload_success_timestamp_seconds": set(),
    "pskgw_upgrades": {"outcome"},
    "pskgw_outbox_messages": {"route"},
    "pskgw_outbox_bytes": {"route"},
    "pskgw_outbox_bytes_max": {"route"},
    "pskgw_outbox_oldest_seconds": {"route"},
    "pskgw_outbox_dead_letters": {"route"},
    "pskgw_outbox_damaged_messages": {"route"},
    "pskgw_outbox_commit_duration_seconds": {"route"},
}
"""Names (without `_total`) and labels as the contract lists them, and those that joined them."""


def test_every_metric_of_the_contract_is_exposed_with_its_labels_and_no_other() -> None:
    registries = [CollectorRegistry() for _ in range(3)]
    worker, follower = WorkerMetrics(registries[0]), FollowerMetrics(registries[1])
    supervisor = SupervisorMetrics(registries[2], version="1.2.3", python="3.11", openssl="4.0")
    worker.handshakes.labels("tls", Outcome.OK, "1.3", "TLS_AES_128_GCM_SHA256").inc()
    worker.connections.labels("tls").set(1)
    for counter in (worker.received_bytes, worker.sent_bytes, worker.messages_received):
        counter.labels("readings").inc()
    worker.messages_delivered.labels("readings", "events").inc()
    worker.messages_rejected.labels("readings", "too_long").inc()
    worker.backend_duration.labels("events", "ok").observe(0.001)
    worker.replies_dropped.labels("readings").inc()
    for gauge in (
        worker.outbox_messages,
        worker.outbox_bytes,
        worker.outbox_bytes_max,
        worker.outbox_oldest,
        worker.outbox_dead,
        worker.outbox_damaged,
    ):
        gauge.labels("readings").set(1)
    worker.outbox_commit_duration.labels("readings").observe(0.001)
    supervisor.commands.labels("delivered").inc()
    supervisor.workers.labels("ready").set(2)
    follower.credentials.labels("active").set(3)

    body, _ = exposition(merge(snapshot(registry) for registry in registries))

    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    ours = {name: family for name, family in families.items() if name.startswith("pskgw_")}
    labels = {
        name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for name, family in ours.items()
    }
    assert labels == CONTRACT
    assert all(family.documentation.endswith(".") for family in ours.values())
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"} <= families.keys()


def test_every_lookup_result_is_there_before_the_first_lookup() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry)
    for result in Lookup:
        assert registry.get_sample_value("pskgw_lookups_total", {"result": result}) == 0


def test_the_outcomes_are_those_of_the_contract() -> None:
    assert " ".join(Outcome) == (
        "ok unknown_identity wrong_key disabled revoked expired not_yet_valid address_refused rate_limited "
        "no_shared_cipher no_route timeout peer_closed protocol_error registry_stale"
    )
