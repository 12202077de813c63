"""Every metric of the gateway, grouped by the process that owns it.

Each process keeps a plain registry of its own; the supervisor collects and sums them (`aggregate`). Labels are
bounded: listeners, routes and backends come from the configuration, the others from the lists here. A device, an
identity or an address is never a label.

An owner binds the children that it needs once (`metrics.received_bytes.labels(route)`), not per event.
"""

import enum
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from gateway.telemetry.tallies import TallyCounter, TallyHistogram

__all__ = ["OK", "FollowerMetrics", "Lookup", "Outcome", "SupervisorMetrics", "WorkerMetrics"]

HANDSHAKE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""From a device on the same machine to one on a bad radio link, up to the default time-out."""

LOOKUP_BUCKETS_S = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025, 0.1)
"""Microseconds while the replica is in memory, milliseconds when its pages come from the disk."""

BACKEND_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""From an fsync on a fast disk to a time-out."""

COMMIT_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
"""From a commit without fsync to a disk that stalls."""

REVOCATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
"""Close-meshed below the promised second."""


class Outcome(enum.StrEnum):
    """How a handshake ended: the label `outcome` of `pskgw_handshakes_total`."""

    OK = "ok"
    UNKNOWN_IDENTITY = "unknown_identity"
    WRONG_KEY = "wrong_key"
    DISABLED = "disabled"
    REVOKED = "revoked"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    ADDRESS_REFUSED = "address_refused"
    RATE_LIMITED = "rate_limited"
    NO_SHARED_CIPHER = "no_shared_cipher"
    NO_ROUTE = "no_route"
    TIMEOUT = "timeout"
    PEER_CLOSED = "peer_closed"
    PROTOCOL_ERROR = "protocol_error"
    REGISTRY_STALE = "registry_stale"


OK: Final = Outcome.OK
"""A name of its own for the outcome that every admitted connection asks for several times, see `connections.ending`."""


class Lookup(enum.StrEnum):
    """What the replica said to an identity: the label `result` of `pskgw_lookups_total`."""

    FOUND = "found"
    UNKNOWN = "unknown"
    DAMAGED = "damaged"  # a record that does not parse, or whose key does not open; logged


class WorkerMetrics:
    """What a worker counts: handshakes, look-ups, bytes and messages."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.handshakes = TallyCounter(
            "pskgw_handshakes",
            "Handshakes that ended, by outcome. tls_version and cipher are empty when none was agreed on.",
            ["listener", "outcome", "tls_version", "cipher"],
            registry=registry,
        )
        self.handshake_duration = TallyHistogram(
            "pskgw_handshake_duration_seconds",
            "Time from the accepted connection to the finished handshake, successful ones only.",
            buckets=HANDSHAKE_BUCKETS_S,
            registry=registry,
        )
        self.connections = Gauge(
            "pskgw_connections",
            "Open connections, those in their handshake included.",
            ["listener"],
            registry=registry,
        )
        self.tasks = Gauge("pskgw_tasks", "Tasks on the event loops of the workers.", registry=registry)
        self.lookups = TallyCounter(
            "pskgw_lookups",
            "Look-ups of an identity in the replica, by result.",
            ["result"],
            registry=registry,
        )
        self.lookup_duration = TallyHistogram(
            "pskgw_lookup_duration_seconds",
            "Time of one look-up in the replica.",
            buckets=LOOKUP_BUCKETS_S,
            registry=registry,
        )
        self.received_bytes = TallyCounter(
            "pskgw_received_bytes", "Payload bytes received from devices.", ["route"], registry=registry
        )
        self.sent_bytes = TallyCounter(
            "pskgw_sent_bytes", "Payload bytes sent to devices.", ["route"], registry=registry
        )
        self.messages_received = TallyCounter(
            "pskgw_messages_received",
            "Messages received from devices, refused ones included.",
            ["route"],
            registry=registry,
        )
        self.messages_delivered = TallyCounter(
            "pskgw_messages_delivered",
            "Messages that the backend confirmed.",
            ["route", "backend"],
            registry=registry,
        )
        self.messages_rejected = TallyCounter(
            "pskgw_messages_rejected",
            "Messages refused, by the reason that the device was told.",
            ["route", "reason"],
            registry=registry,
        )
        self.replies_dropped = Counter(
            "pskgw_replies_dropped",
            "Replies of backends that the framing of the route cannot carry; the device was told ok instead.",
            ["route"],
            registry=registry,
        )
        self.backend_duration = Histogram(
            "pskgw_backend_duration_seconds",
            "Time of one delivery of a batch, or of one connection attempt of a stream route.",
            ["backend", "outcome"],
            buckets=BACKEND_BUCKETS_S,
            registry=registry,
        )
        self.outbox_messages = Gauge(
            "pskgw_outbox_messages",
            "Messages in spools that the backend has not confirmed.",
            ["route"],
            registry=registry,
        )
        self.outbox_bytes = Gauge(
            "pskgw_outbox_bytes",
            "What spools hold, dead letters included, as spool.bytes_max counts it: payload and 256 bytes a message.",
            ["route"],
            registry=registry,
        )
        self.outbox_bytes_max = Gauge(
            "pskgw_outbox_bytes_max",
            "What spools may hold: spool.bytes_max of the route. Past it messages are refused with full.",
            ["route"],
            registry=registry,
        )
        self.outbox_oldest = Gauge(
            "pskgw_outbox_oldest_seconds",
            "How long the first message in a spool waits for the backend; 0 when none does.",
            ["route"],
            registry=registry,
        )
        self.outbox_dead = Gauge(
            "pskgw_outbox_dead_letters",
            "Messages that the backend refused for good, or that waited too long: see gatewayctl list-dead-letters.",
            ["route"],
            registry=registry,
        )
        self.outbox_damaged = Gauge(
            "pskgw_outbox_damaged_messages",
            "Messages that could not be read from a spool again; their raw rows are kept in the spool file.",
            ["route"],
            registry=registry,
        )
        self.outbox_commit_duration = Histogram(
            "pskgw_outbox_commit_duration_seconds",
            "Time of one commit to a spool, from the event loop and back.",
            ["route"],
            buckets=COMMIT_BUCKETS_S,
            registry=registry,
        )
        self.revocation = Histogram(
            "pskgw_revocation_seconds",
            "Time from the commit of a change in the registry to the queued close of the sessions that it ends.",
            buckets=REVOCATION_BUCKETS_S,
            registry=registry,
        )
        ProcessCollector(registry=registry)
        for result in Lookup:
            self.lookups.labels(
                result.value
            )  # present from the start, so that a first increase is seen as one


class FollowerMetrics:
    """What the follower of the registry knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.revision = Gauge(
            "pskgw_registry_revision",
            "Sequence of the last registry change in the replica.",
            registry=registry,
        )
        self.age = Gauge(
            "pskgw_registry_age_seconds",
            "Time since the registry was last read successfully.",
            registry=registry,
        )
        self.credentials = Gauge(
            "pskgw_credentials", "Credentials by state, counted once a minute.", ["state"], registry=registry
        )
        self.expiring = Gauge(
            "pskgw_devices_expiring",
            "Devices that cannot connect 14 days from now unless something is done, counted once a minute.",
            registry=registry,
        )
        self.enrolments = Counter(
            "pskgw_enrolments",
            "Devices that were added, or refused, after they proved the key that their realm derives.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("added", "refused"):
            self.enrolments.labels(outcome)  # present from the start, so that a first increase is seen as one
        ProcessCollector(registry=registry)


class SupervisorMetrics:
    """What the supervisor says of the gateway as a whole."""

    def __init__(self, registry: CollectorRegistry, *, version: str, python: str, openssl: str) -> None:
        self.build_info = Gauge(
            "pskgw_build_info",
            "Always 1; the labels tell the versions that run.",
            ["version", "python", "openssl"],
            registry=registry,
        )
        self.build_info.labels(version, python, openssl).set(1)
        self.workers = Gauge(
            "pskgw_workers",
            "Worker processes that accept devices (ready), that do not yet (starting), or that do not answer (silent).",
            ["state"],
            registry=registry,
        )
        self.restarts = Counter(
            "pskgw_process_restarts",
            "Processes that ended by themselves and were started again.",
            ["process"],
            registry=registry,
        )
        for process in ("worker", "follower"):
            self.restarts.labels(process)  # present from the start, so that a first increase is seen as one
        self.reloads = Counter(
            "pskgw_config_reloads",
            "Reloads of the configuration: applied, or refused because it is broken (the one before stays in force).",
            ["outcome"],
            registry=registry,
        )
        self.reload_successful = Gauge(
            "pskgw_config_last_reload_successful",
            "Whether the configuration was applied when it was read last, at the start or by a reload.",
            registry=registry,
        )
        self.reload_success_time = Gauge(
            "pskgw_config_last_reload_success_timestamp_seconds",
            "When the configuration in force was applied.",
            registry=registry,
        )
        self.upgrades = Counter(
            "pskgw_upgrades",
            "Upgrades of the running gateway: done, or refused before anything was stopped.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("applied", "refused"):
            self.reloads.labels(outcome)  # present from the start, so that a first increase is seen as one
        for outcome in ("done", "refused"):
            self.upgrades.labels(outcome)
        self.commands = Counter(
            "pskgw_commands",
            "Commands to devices that an operator or a broker sent, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        ProcessCollector(registry=registry)
