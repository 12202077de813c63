"""Who is it? From an offered identity to a key: the device's own, or a decoy.

One per worker. It reads the replica that the follower writes, opens the sealed key for this one handshake, and evaluates
what may refuse the device: switched off, revoked, outside its window or its networks. Whatever the reason, an identity
that is refused gets a decoy key, and its handshake fails exactly as one with a wrong key does; only the outcome that
goes to log and metrics knows better.
"""

import functools
import hmac
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from gateway.errors import RegistryError
from gateway.registry.derivation import derive_key
from gateway.registry.identities import is_identity
from gateway.registry.notices import Overlay
from gateway.registry.records import CommandRecord, CredentialRecord, RealmRecord, identity_key
from gateway.registry.replica import ReplicaReader
from gateway.registry.sealing import Sealer, credential_context, realm_context, secret_context
from gateway.server.networks import NetworkList
from gateway.telemetry.metrics import OK, Lookup, Outcome, WorkerMetrics
from gateway.tls.session import PskChoice
from gateway.wire.client_hello import OfferedPsk

__all__ = ["NEWCOMER", "DeviceLookup", "Resolution", "refusal"]

log = structlog.get_logger()

NEWCOMER: Final = 0
"""The device id of a session whose device is being added."""
_IDENTITIES_MAX: Final = 8
"""How many offered identities are looked at. Devices offer one, or a ticket and one; a hello has room for a thousand."""
_DIGEST_BYTES: Final = {"sha256": 32, "sha384": 48}


class Resolution(PskChoice):
    """A key for one handshake. `record` is the device's when `outcome` is OK; otherwise the key is a decoy."""

    outcome: Outcome
    record: CredentialRecord | None


def refusal(record: CredentialRecord, address: str, now: float) -> Outcome:
    """Why a device with this record may not connect from `address` at Unix time `now`; OK when it may."""
    if record.disabled:
        return Outcome.DISABLED
    if record.revoked:
        return Outcome.REVOKED
    if record.not_before is not None and now < record.not_before:
        return Outcome.NOT_YET_VALID
    if record.not_after is not None and now >= record.not_after:
        return Outcome.EXPIRED
    if record.networks and address not in _network_list(record.networks):
        return Outcome.ADDRESS_REFUSED
    return OK


@functools.lru_cache(1024)
def _network_list(networks: tuple[str, ...]) -> NetworkList:
    return NetworkList(networks)


class DeviceLookup:
    """The replica as a worker reads it. Nothing works before the first `publish`."""

    def __init__(self, sealer: Sealer, metrics: WorkerMetrics, *, max_staleness_s: float = 0) -> None:
        """With a `max_staleness_s` nobody is let in before `polled`, nor so many seconds after it."""
        self._sealer = sealer
        self._observe_duration = metrics.lookup_duration.observe
        self._count_found = metrics.lookups.labels(Lookup.FOUND.value).inc
        self._count_unknown = metrics.lookups.labels(Lookup.UNKNOWN.value).inc
        self._count_damaged = metrics.lookups.labels(Lookup.DAMAGED.value).inc
        self._reader: ReplicaReader | None = None
        self._generation = Path()
        self._realms: dict[str, RealmRecord] = {}
        self._decoy_secret = b""
        self._overlay: Overlay = {}
        self._damaged = 0
        self._max_staleness_s = max_staleness_s
        self._stale_at = 0.0 if max_staleness_s else math.inf
        self._has_commands = False
        """As of the last notice of the follower, which comes for every command."""

    @property
    def is_ready(self) -> bool:
        """Whether a replica is open."""
        return self._reader is not None

    @property
    def realms(self) -> dict[str, RealmRecord]:
        """All realms by name."""
        return self._realms

    def publish(self, generation: Path, *, keep_overlay: bool = False) -> None:
        """Read from this generation of the replica from now on. Raises RegistryError and keeps the old one.

        A follower that was started again publishes the generation that is open already; LMDB opens none twice.
        """
        if self._reader is None or generation != self._generation:
            self._open_reader(generation)
        if not keep_overlay:
            self._overlay = {}
        self.reload_realms()
        self._has_commands = self._reader is not None and self._reader.has_commands()

    def _open_reader(self, generation: Path) -> None:
        reader = ReplicaReader.open(generation)
        try:
            meta = reader.meta()
            assert meta is not None
            secret = self._sealer.open(meta.secrets["decoy"], secret_context("decoy"))
        except BaseException:
            reader.close()
            raise
        old, self._reader = self._reader, reader
        if old is not None:
            old.close()
        self._generation = generation
        self._decoy_secret = secret
        self._damaged = 0

    def reload_realms(self) -> None:
        """Read the realms again, after they changed."""
        assert self._reader is not None
        self._realms = {realm.name: realm for realm in self._reader.realms()}

    def polled(self, at: float) -> None:
        """The replica was as the registry is at Unix time `at`."""
        if self._max_staleness_s:
            self._stale_at = at + self._max_staleness_s

    def replace_overlay(self, records: Overlay) -> None:
        """The replica has changed. What stands above it while it cannot be written, by `identity_key`; None: not there any more."""
        self._overlay = records
        self._has_commands = self._reader is not None and self._reader.has_commands()

    def close(self) -> None:
        """Close the replica."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def record(self, realm_id: int, identity: bytes) -> CredentialRecord | None:
        """What the registry says of an identity, None when it is not there (or its record does not parse)."""
        assert self._reader is not None
        if self._overlay:
            key = identity_key(realm_id, identity)
            if key in self._overlay:
                return self._overlay[key]
        started = time.perf_counter()
        record = self._reader.credential(realm_id, identity)
        self._observe_duration(time.perf_counter() - started)
        if record is not None:
            self._count_found()
        elif self._reader.damaged == self._damaged:
            self._count_unknown()
        else:
            self._damaged = self._reader.damaged
            self._count_damaged()
            log.error("replica_record_damaged", realm=realm_id, identity=identity.decode("utf-8", "replace"))
        return record

    def commands(self, device_id: int) -> list[CommandRecord]:
        """What waits for a device, in order; those that have expired may be among them."""
        return self._reader.commands(device_id) if self._reader is not None and self._has_commands else []

    def resolve(
        self, realm: RealmRecord | None, offered: Sequence[OfferedPsk], address: str, now: float
    ) -> Resolution | None:
        """The first offered identity that may connect, else a decoy, else None when nothing offered can be an identity.

        A client that resumes offers its ticket beside its identity (and OpenSSL has sent it one whatever we say), so a
        decoy goes only to what can be an identity, and only when none of the offered is known: a decoy for the ticket
        would lock that client out.
        """
        offered = offered[:_IDENTITIES_MAX]
        refused: Resolution | None = None
        for psk in offered:
            identity = psk.identity
            if realm is None or not is_identity(identity):
                continue
            record = self.record(realm.id, identity)
            if record is None:
                continue
            outcome = self._judge(realm, record, psk, address, now)
            if outcome is OK:
                key = self._open(realm, record, identity)
                if key is not None:
                    return Resolution(identity, key, record.hash, OK, record)
                outcome = Outcome.UNKNOWN_IDENTITY
            if refused is None:
                refused = self._decoy(realm, psk, outcome)
        if refused is not None:
            return refused
        if (
            realm is not None
            and realm.enrolls
            and (newcomer := self._newcomer(realm, offered, now)) is not None
        ):
            return newcomer
        for psk in offered:
            # In TLS 1.2 there is one identity and no ticket in its place: whatever it is, it fails like a wrong key.
            if not psk.binder_length or is_identity(psk.identity):
                return self._decoy(realm, psk, Outcome.UNKNOWN_IDENTITY)
        return None

    def _decoy(self, realm: RealmRecord | None, psk: OfferedPsk, outcome: Outcome) -> Resolution:
        """A key that nobody knows, always the same for an identity, of the hash that the binder's length tells."""
        key = hmac.digest(
            self._decoy_secret, identity_key(0 if realm is None else realm.id, psk.identity), "sha256"
        )
        hash_name = "sha384" if psk.binder_length == _DIGEST_BYTES["sha384"] else "sha256"
        return Resolution(psk.identity, key, hash_name, outcome, None)

    def _judge(
        self, realm: RealmRecord, record: CredentialRecord, psk: OfferedPsk, address: str, now: float
    ) -> Outcome:
        """Whether what was offered may go on, as far as the record tells."""
        if psk.binder_length and psk.binder_length != _DIGEST_BYTES[record.hash]:
            return Outcome.UNKNOWN_IDENTITY
        outcome = refusal(record, address, now)
        if realm.idle_days is not None and outcome is OK and self._is_idle(realm, record):
            return Outcome.EXPIRED
        if now > self._stale_at and outcome is OK:
            return Outcome.REGISTRY_STALE
        return outcome

    def _newcomer(self, realm: RealmRecord, offered: Sequence[OfferedPsk], now: float) -> Resolution | None:
        """The first offered identity, with the key that its realm derives for it: who proves it is added as a device."""
        for psk in offered:
            if is_identity(psk.identity) and psk.binder_length in {0, _DIGEST_BYTES["sha256"]}:
                if now > self._stale_at:
                    return self._decoy(realm, psk, Outcome.REGISTRY_STALE)
                record = _provisional(realm, psk.identity)
                key = self._open(realm, record, psk.identity)
                return None if key is None else Resolution(psk.identity, key, record.hash, OK, record)
        return None

    @staticmethod
    def _is_idle(realm: RealmRecord, record: CredentialRecord) -> bool:
        """Whether it was not used for more days of service than its realm allows."""
        assert realm.idle_days is not None
        unused_days = realm.service_day - record.used_on
        if unused_days <= realm.idle_days:
            return False
        log.info("credential_idle", realm=realm.name, device=record.device, unused_days=unused_days)
        return True

    def _open(self, realm: RealmRecord, record: CredentialRecord, identity: bytes) -> bytes | None:
        try:
            if record.sealed_key:
                return self._sealer.open(record.sealed_key, credential_context(record.realm_id, identity))
            secret = self._sealer.open(realm.sealed_secret, realm_context(realm.id))
            return derive_key(realm.key_source, secret, identity)
        except RegistryError as exc:
            self._count_damaged()
            log.error("sealed_key_unusable", device=record.device, reason=str(exc))
            return None


def _provisional(realm: RealmRecord, identity: bytes) -> CredentialRecord:
    """What stands for a device until it is added; its ids are of nobody."""
    return CredentialRecord(
        credential_id=0,
        device_id=NEWCOMER,
        realm_id=realm.id,
        device=identity.decode("utf-8"),
        group=None,
        labels={},
        disabled=False,
        revoked=False,
        not_before=None,
        not_after=None,
        networks=(),
        hash="sha256",
        sealed_key=b"",
    )
