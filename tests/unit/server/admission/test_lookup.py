"""From an offered identity to a key or a decoy, on a real replica."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from gateway.errors import RegistryMismatch
from gateway.registry.derivation import derive_key
from gateway.registry.records import CredentialRecord, RealmRecord, identity_key
from gateway.registry.replica import FORMAT, ReplicaMeta, create_generation
from gateway.registry.sealing import MasterKey, Sealer, credential_context, realm_context, secret_context
from gateway.server.admission.lookup import NEWCOMER, DeviceLookup, Resolution, refusal
from gateway.telemetry.metrics import Outcome, WorkerMetrics
from gateway.wire.client_hello import OfferedPsk

SEALER = Sealer([MasterKey(bytes(32))])
REALM = RealmRecord(1, "default", None)
OTHER = RealmRecord(2, "other", "hint")
SECRET = b"s" * 32
DERIVED = RealmRecord(
    3, "derived", None, key_source="derived-hmac", sealed_secret=SEALER.seal(SECRET, realm_context(3))
)
FIRST_USE = msgspec.structs.replace(DERIVED, enrolls=True)
ADDRESS = "192.0.2.7"
NOW = 1_000_000.0
KEY = b"k" * 32


def record(identity: str, **changes: Any) -> CredentialRecord:
    fields: dict[str, Any] = {
        "credential_id": 1,
        "device_id": 1,
        "realm_id": 1,
        "device": identity,
        "group": None,
        "labels": {},
        "disabled": False,
        "revoked": False,
        "not_before": None,
        "not_after": None,
        "networks": (),
        "hash": "sha256",
        "sealed_key": SEALER.seal(KEY, credential_context(1, identity.encode())),
    }
    return CredentialRecord(**(fields | changes))


RECORDS = {
    "good": record("good"),
    "second": record("second"),
    "sha384": record("sha384", hash="sha384"),
    "disabled": record("disabled", disabled=True),
    "revoked": record("revoked", revoked=True),
    "expired": record("expired", not_after=NOW),
    "early": record("early", not_before=NOW + 1),
    "elsewhere": record("elsewhere", networks=("198.51.100.0/24",)),
    "moved": record("moved", sealed_key=SEALER.seal(KEY, credential_context(1, b"other"))),
}


DERIVED_RECORDS = {
    "unit": record("unit", realm_id=3, sealed_key=b"", used_on=10),
    "removed": record("removed", realm_id=3, sealed_key=b"", credential_id=0, revoked=True),
}


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    writer = create_generation(tmp_path)
    secrets = {"decoy": SEALER.seal(b"d" * 32, secret_context("decoy"))}
    with writer.batch() as batch:
        batch.put_credentials({identity_key(1, name.encode()): value for name, value in RECORDS.items()})
        batch.put_credentials(
            {identity_key(3, name.encode()): value for name, value in DERIVED_RECORDS.items()}
        )
        batch.replace_realms([REALM, OTHER])
        batch.put_meta(ReplicaMeta(FORMAT, "registry", 1, time.time(), secrets))
    writer.close()  # LMDB opens a file once in a process
    return writer.generation


@pytest.fixture
def lookup(generation: Path) -> Iterator[DeviceLookup]:
    found = DeviceLookup(SEALER, WorkerMetrics(CollectorRegistry()))
    assert not found.is_ready
    found.publish(generation)
    yield found
    found.close()


def resolve(
    lookup: DeviceLookup, *identities: str | bytes, binder: int = 32, realm: RealmRecord | None = REALM
) -> Resolution | None:
    offered = [
        OfferedPsk(identity.encode() if isinstance(identity, str) else identity, binder)
        for identity in identities
    ]
    return lookup.resolve(realm, offered, ADDRESS, NOW)


@pytest.mark.parametrize("binder", [0, 32])
def test_a_known_device_gets_its_key(lookup: DeviceLookup, binder: int) -> None:
    found = resolve(lookup, "good", binder=binder)
    assert found is not None
    assert (found.outcome, found.key, found.identity, found.record) == (
        Outcome.OK,
        KEY,
        b"good",
        RECORDS["good"],
    )


@pytest.mark.parametrize("binder", [0, 32])
@pytest.mark.parametrize(
    ("identity", "outcome"),
    [
        ("who", Outcome.UNKNOWN_IDENTITY),
        ("disabled", Outcome.DISABLED),
        ("revoked", Outcome.REVOKED),
        ("expired", Outcome.EXPIRED),
        ("early", Outcome.NOT_YET_VALID),
        ("elsewhere", Outcome.ADDRESS_REFUSED),
        ("moved", Outcome.UNKNOWN_IDENTITY),
    ],
)
def test_whoever_may_not_gets_a_decoy(
    lookup: DeviceLookup, identity: str, outcome: Outcome, binder: int
) -> None:
    found = resolve(lookup, identity, binder=binder)
    assert found is not None
    assert found.outcome is outcome
    assert found.record is None
    assert found.key != KEY
    assert len(found.key) == 32
    assert found.hash_name == "sha256"
    again = resolve(lookup, identity, binder=binder)
    assert again is not None
    assert again.key == found.key


def test_decoys_differ_by_identity_and_realm(lookup: DeviceLookup) -> None:
    keys = {
        found.key
        for found in (
            resolve(lookup, "a"),
            resolve(lookup, "b"),
            resolve(lookup, "a", realm=OTHER),
            resolve(lookup, "a", realm=None),
        )
        if found is not None
    }
    assert len(keys) == 4


def test_the_hash_of_the_binder_decides(lookup: DeviceLookup) -> None:
    """A credential of the other hash counts as unknown, and its decoy has the hash that was offered."""
    good = resolve(lookup, "good", binder=48)
    assert good is not None
    assert (good.outcome, good.hash_name) == (Outcome.UNKNOWN_IDENTITY, "sha384")
    other = resolve(lookup, "sha384", binder=32)
    assert other is not None
    assert (other.outcome, other.hash_name) == (Outcome.UNKNOWN_IDENTITY, "sha256")
    fitting = resolve(lookup, "sha384", binder=48)
    assert fitting is not None
    assert (fitting.outcome, fitting.hash_name) == (Outcome.OK, "sha384")


def test_the_first_known_identity_wins(lookup: DeviceLookup) -> None:
    found = resolve(lookup, "who", "second", "good")
    assert found is not None
    assert found.identity == b"second"


def test_a_ticket_beside_an_identity_is_passed_over(lookup: DeviceLookup) -> None:
    ticket = bytes(range(128, 256))
    good = resolve(lookup, ticket, "good")
    assert good is not None
    assert good.identity == b"good"
    unknown = resolve(lookup, ticket, "who")
    assert unknown is not None
    assert unknown.identity == b"who"
    assert resolve(lookup, ticket) is None


def test_an_impossible_identity_in_tls12_fails_like_a_wrong_key(lookup: DeviceLookup) -> None:
    found = resolve(lookup, b"\xff\x00", binder=0)
    assert found is not None
    assert found.outcome is Outcome.UNKNOWN_IDENTITY


def test_a_refused_identity_does_not_hide_a_good_one(lookup: DeviceLookup) -> None:
    found = resolve(lookup, "disabled", "good")
    assert found is not None
    assert found.outcome is Outcome.OK


def test_a_thousand_identities_cost_no_thousand_lookups(lookup: DeviceLookup) -> None:
    found = resolve(lookup, *[f"who-{number}" for number in range(1000)], "good")
    assert found is not None
    assert found.outcome is Outcome.UNKNOWN_IDENTITY


def test_an_overlay_stands_above_the_replica(lookup: DeviceLookup) -> None:
    lookup.replace_overlay({identity_key(1, b"good"): None, identity_key(1, b"new"): record("new")})
    gone, new = resolve(lookup, "good"), resolve(lookup, "new")
    assert gone is not None
    assert gone.outcome is Outcome.UNKNOWN_IDENTITY
    assert new is not None
    assert new.outcome is Outcome.OK
    lookup.replace_overlay({})
    back = resolve(lookup, "good")
    assert back is not None
    assert back.outcome is Outcome.OK


def test_another_master_key_does_not_open_the_replica(lookup: DeviceLookup, tmp_path: Path) -> None:
    (generation,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    lookup.close()
    other = DeviceLookup(Sealer([MasterKey(b"x" * 32)]), WorkerMetrics(CollectorRegistry()))
    with pytest.raises(RegistryMismatch):
        other.publish(generation)
    assert not other.is_ready


def test_the_generation_that_is_open_may_be_published_again(lookup: DeviceLookup, tmp_path: Path) -> None:
    (generation,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    lookup.replace_overlay({identity_key(1, b"good"): None})
    lookup.publish(generation)
    found = resolve(lookup, "good")
    assert found is not None
    assert found.outcome is Outcome.OK


@pytest.mark.parametrize(
    ("networks", "address", "outcome"),
    [
        ((), "anything", Outcome.OK),
        (("192.0.2.0/24",), "192.0.2.255", Outcome.OK),
        (("192.0.2.0/24",), "::ffff:192.0.2.1", Outcome.OK),
        (("192.0.2.0/24",), "192.0.3.0", Outcome.ADDRESS_REFUSED),
        (("2001:db8::/32", "10.0.0.0/8"), "10.9.9.9", Outcome.OK),
        (("2001:db8::/32",), "2001:db9::1", Outcome.ADDRESS_REFUSED),
        (("192.0.2.0/24",), "", Outcome.ADDRESS_REFUSED),
    ],
)
def test_networks(networks: tuple[str, ...], address: str, outcome: Outcome) -> None:
    assert refusal(record("d", networks=networks), address, NOW) is outcome


def test_a_window_begins_at_its_start_and_ends_at_its_end() -> None:
    windowed = record("d", not_before=NOW, not_after=NOW + 1)
    assert refusal(windowed, ADDRESS, NOW - 0.001) is Outcome.NOT_YET_VALID
    assert refusal(windowed, ADDRESS, NOW) is Outcome.OK
    assert refusal(windowed, ADDRESS, NOW + 1) is Outcome.EXPIRED


def derived(identity: str) -> bytes:
    return derive_key("derived-hmac", SECRET, identity.encode())


@pytest.mark.parametrize("binder", [0, 32])
def test_a_derived_key_is_computed_for_registered_devices(lookup: DeviceLookup, binder: int) -> None:
    found = resolve(lookup, "unit", realm=DERIVED, binder=binder)
    assert found is not None
    assert (found.outcome, found.key) == (Outcome.OK, derived("unit"))
    unknown = resolve(lookup, "nobody", realm=DERIVED, binder=binder)
    assert unknown is not None
    assert unknown.outcome is Outcome.UNKNOWN_IDENTITY
    assert unknown.key != derived("nobody")


@pytest.mark.parametrize(
    "realm",
    [
        msgspec.structs.replace(DERIVED, key_source="derived-later"),
        msgspec.structs.replace(DERIVED, sealed_secret=b""),
        msgspec.structs.replace(DERIVED, sealed_secret=SEALER.seal(SECRET, realm_context(4))),
    ],
)
def test_a_realm_whose_secret_is_no_use_knows_nobody(lookup: DeviceLookup, realm: RealmRecord) -> None:
    found = resolve(lookup, "unit", realm=realm)
    assert found is not None
    assert found.outcome is Outcome.UNKNOWN_IDENTITY
    assert found.record is None


@pytest.mark.parametrize("binder", [0, 32])
def test_a_newcomer_gets_the_key_that_its_realm_derives(lookup: DeviceLookup, binder: int) -> None:
    found = resolve(lookup, b"\xff ticket", "newcomer", realm=FIRST_USE, binder=binder)
    assert found is not None
    assert (found.identity, found.outcome, found.key) == (b"newcomer", Outcome.OK, derived("newcomer"))
    assert found.record is not None
    assert (found.record.device_id, found.record.device) == (NEWCOMER, "newcomer")


def test_a_device_goes_before_a_newcomer_and_a_removed_one_stays_out(lookup: DeviceLookup) -> None:
    found = resolve(lookup, "newcomer", "unit", realm=FIRST_USE)
    assert found is not None
    assert found.identity == b"unit"
    removed = resolve(lookup, "removed", realm=FIRST_USE)
    assert removed is not None
    assert (removed.outcome, removed.record) == (Outcome.REVOKED, None)
    assert removed.key != derived("removed")
    other_hash = resolve(lookup, "newcomer", realm=FIRST_USE, binder=48)
    assert other_hash is not None
    assert other_hash.outcome is Outcome.UNKNOWN_IDENTITY


@pytest.mark.parametrize(
    ("idle_days", "service_day", "outcome"),
    [(None, 1000, Outcome.OK), (5, 15, Outcome.OK), (5, 16, Outcome.EXPIRED), (5, 3, Outcome.OK)],
)
def test_a_credential_is_idle_after_so_many_days_of_service(
    lookup: DeviceLookup, idle_days: int | None, service_day: int, outcome: Outcome
) -> None:
    realm = msgspec.structs.replace(DERIVED, idle_days=idle_days, service_day=service_day)
    found = resolve(lookup, "unit", realm=realm)
    assert found is not None
    assert found.outcome is outcome


def test_an_overlay_outlives_a_follower_that_starts_again(lookup: DeviceLookup, tmp_path: Path) -> None:
    (generation,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    lookup.replace_overlay({identity_key(1, b"good"): None})
    lookup.publish(generation, keep_overlay=True)
    found = resolve(lookup, "good")
    assert found is not None
    assert found.outcome is Outcome.UNKNOWN_IDENTITY


@pytest.fixture
def bounded(generation: Path) -> Iterator[DeviceLookup]:
    """A look-up whose replica may be 60 s old."""
    found = DeviceLookup(SEALER, WorkerMetrics(CollectorRegistry()), max_staleness_s=60)
    found.publish(generation)
    yield found
    found.close()


def outcomes(lookup: DeviceLookup) -> list[Outcome]:
    found = [resolve(lookup, name) for name in ("good", "disabled", "nobody")]
    found.append(resolve(lookup, "newcomer", realm=FIRST_USE))
    return [each.outcome for each in found if each is not None]


def test_a_replica_that_is_too_old_lets_nobody_in(bounded: DeviceLookup) -> None:
    """What would be refused anyway keeps its reason."""
    stale = [
        Outcome.REGISTRY_STALE,
        Outcome.DISABLED,
        Outcome.UNKNOWN_IDENTITY,
        Outcome.REGISTRY_STALE,
    ]
    fresh = [Outcome.OK, Outcome.DISABLED, Outcome.UNKNOWN_IDENTITY, Outcome.OK]
    assert outcomes(bounded) == stale, "nobody said yet how old it is"
    for age_s, expected in ((0, fresh), (60, fresh), (60.1, stale)):
        bounded.polled(NOW - age_s)
        assert outcomes(bounded) == expected
    found = resolve(bounded, "good")
    assert found is not None
    assert found.key != KEY
    assert found.record is None


def test_without_a_limit_no_replica_is_too_old(lookup: DeviceLookup) -> None:
    lookup.polled(0)
    assert outcomes(lookup)[0] is Outcome.OK
