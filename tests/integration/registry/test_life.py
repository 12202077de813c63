"""Rotation, revocation, changes, realms, last use, resealing: what the commands write, on every database."""

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, select

from gateway.errors import RegistryMismatch, RegistryRefused
from gateway.registry import feed, resealing, schema
from gateway.registry.credentials import NewCredential
from gateway.registry.devices import DeviceChanges, NewDevice
from gateway.registry.ledger import Author
from gateway.registry.listing import DeviceFilter
from gateway.registry.realms import NewRealm, RealmChanges
from gateway.registry.sealing import Key, Sealer, credential_context
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry

NOON = dt.datetime(2030, 1, 2, 12, 0, 0, 123456, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
KEY = Key(bytes(range(32)))


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> dt.datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(settings: RegistrySettings, clock: Clock) -> Iterator[Registry]:
    with Registry(settings, Author("alice", "console"), now=clock) as registry:
        yield registry


def everything(engine: Engine) -> dict[str, Any]:
    with engine.connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(select(table)).all()))
            for table in schema.metadata.sorted_tables
        }


def credentials(registry: Registry, name: str) -> dict[str, tuple[Any, Any]]:
    device = registry.device("default", name)
    return {each.identity: (each.not_after, each.revoked_at) for each in device.credentials}


# Rotation and revocation


def test_rotation_adds_an_identity_and_lets_the_old_run_out(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="m"))
    first = registry.rotate_key("default", "m", NewCredential(grace=10 * DAY))
    assert (first.identity, first.old) == ("m.2", (("m", NOON + 10 * DAY),))
    assert len(first.key) == 32
    second = registry.rotate_key("default", "m", NewCredential(grace=20 * DAY, not_after=NOON + 99 * DAY))
    assert second.old == (("m", NOON + 10 * DAY), ("m.2", NOON + 20 * DAY)), "none is made to last longer"
    assert credentials(registry, "m") == {
        "m": (NOON + 10 * DAY, None),
        "m.2": (NOON + 20 * DAY, None),
        "m.3": (NOON + 99 * DAY, None),
    }


def test_rotation_passes_over_identities_that_are_taken(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="m"))
    registry.add_device(NewDevice(identity="m.2"))
    assert registry.rotate_key("default", "m", NewCredential()).identity == "m.3"
    named = registry.rotate_key("default", "m", NewCredential(identity="quite else", key=KEY))
    assert (named.identity, named.key) == ("quite else", KEY)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (NewCredential(identity="other"), "identity 'other' is taken in realm 'default'"),
        (NewCredential(identity="m"), "identity 'm' is taken"),
        (NewCredential(identity="x\n"), "has control characters"),
        (NewCredential(key=Key(b"short")), "the key has 5 bytes"),
        (NewCredential(not_after=NOON), "would be over already"),
    ],
)
def test_a_rotation_that_cannot_be_writes_nothing(
    registry: Registry, engine: Engine, new: NewCredential, message: str
) -> None:
    registry.add_device(NewDevice(identity="m"))
    registry.add_device(NewDevice(identity="other"))
    before = everything(engine)
    with pytest.raises(RegistryRefused, match=message):
        registry.rotate_key("default", "m", new)
    assert everything(engine) == before


def test_a_name_too_long_for_a_number_needs_an_identity(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="n" * 128))
    with pytest.raises(RegistryRefused, match="name the new identity with --identity"):
        registry.rotate_key("default", "n" * 128, NewCredential())
    assert registry.rotate_key("default", "n" * 128, NewCredential(identity="n")).identity == "n"


def test_a_credential_that_begins_after_the_grace_time_is_a_conflict(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="m", not_before=NOON + 5 * DAY))
    with pytest.raises(RegistryRefused, match="begins only after the grace time"):
        registry.rotate_key("default", "m", NewCredential(grace=DAY))
    assert registry.rotate_key("default", "m", NewCredential(grace=6 * DAY)).identity == "m.2"


def test_revoking_is_once_and_for_one_identity(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="m"))
    registry.rotate_key("default", "m", NewCredential())
    assert registry.revoke_key("default", "m.2") == "m"
    assert registry.revoke_key("default", "m.2") is None
    assert {name: revoked for name, (_, revoked) in credentials(registry, "m").items()} == {
        "m": None,
        "m.2": NOON,
    }
    with pytest.raises(RegistryRefused, match="identity 'none' does not exist"):
        registry.revoke_key("default", "none")
    with pytest.raises(RegistryRefused, match="realm 'nowhere' does not exist"):
        registry.revoke_key("nowhere", "m")


def test_the_same_key_twice_is_named(registry: Registry) -> None:
    assert registry.add_device(NewDevice(identity="a", key=KEY)).same_key_as == ()
    assert registry.add_device(NewDevice(identity="b", key=KEY)).same_key_as == ("default/a",)
    registry.revoke_key("default", "a")
    rotated = registry.rotate_key("default", "b", NewCredential(key=KEY))
    assert rotated.same_key_as == ("default/a", "default/b")


# Changes of a device


def test_a_device_changes_in_what_is_given(registry: Registry) -> None:
    registry.add_device(
        NewDevice(identity="m", group="g", labels={"a": "1", "b": "2"}, networks=["10.0.0.0/8"])
    )
    changes = DeviceChanges(labels={"b": "3", "c": "4"}, labels_removed=["a", "zz"], not_after=NOON + DAY)
    assert registry.update_device("default", "m", changes)
    assert not registry.update_device("default", "m", changes)
    device = registry.device("default", "m")
    assert (device.group, device.labels, device.networks) == ("g", {"b": "3", "c": "4"}, ("10.0.0.0/8",))
    assert device.credentials[0].not_after == NOON + DAY
    assert registry.update_device("default", "m", DeviceChanges(group=None, networks=(), not_after=None))
    device = registry.device("default", "m")
    assert (device.group, device.networks, device.credentials[0].not_after) == (None, (), None)
    (*_, first, second) = registry.audit_rows()
    assert (first.action, first.details["labels"]) == ("update-device", {"b": "3", "c": "4"})
    assert second.details == {"group_name": None, "networks": [], "identity": "m", "not_after": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (DeviceChanges(not_before=NOON + 2 * DAY), "not-before must be earlier than not-after"),
        (DeviceChanges(not_after=NOON - DAY, not_before=NOON), "not-before must be earlier"),
        (DeviceChanges(identity="else", not_after=NOON), "no credential with the identity 'else'"),
        (DeviceChanges(identity="m"), "no window for it"),
        (DeviceChanges(networks=["10.0.0.1/8"]), "has bits set behind its prefix"),
        (DeviceChanges(group="g\n", labels={"a": "1"}), "has control characters"),
    ],
)
def test_a_change_that_cannot_be_writes_nothing(
    registry: Registry, engine: Engine, changes: DeviceChanges, message: str
) -> None:
    registry.add_device(NewDevice(identity="m", not_after=NOON + DAY))
    before = everything(engine)
    with pytest.raises(RegistryRefused, match=message):
        registry.update_device("default", "m", changes)
    assert everything(engine) == before


def test_a_window_of_several_credentials_needs_an_identity(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="m"))
    registry.rotate_key("default", "m", NewCredential())
    with pytest.raises(RegistryRefused, match=r"name one of 'm', 'm\.2' with --identity"):
        registry.update_device("default", "m", DeviceChanges(not_after=NOON + DAY))
    registry.update_device("default", "m", DeviceChanges(identity="m.2", not_after=NOON + DAY))
    assert credentials(registry, "m")["m.2"] == (NOON + DAY, None)
    registry.revoke_key("default", "m.2")
    assert registry.update_device("default", "m", DeviceChanges(not_after=NOON + DAY)), "one is left"


def test_devices_are_found_by_their_ends_and_their_last_use(registry: Registry, clock: Clock) -> None:
    registry.begin_service_day()
    for name, days in (("soon", 3), ("later", 30), ("over", -1)):
        registry.add_device(NewDevice(identity=name, not_after=NOON + days * DAY))
    registry.add_device(NewDevice(identity="never"))

    def found(**wanted: Any) -> list[str]:
        return [device.name for device in registry.devices(DeviceFilter(**wanted))]

    assert found(expiring=(NOON, NOON + 7 * DAY)) == ["soon"]
    assert found(expiring=(NOON, NOON + 30 * DAY)) == ["soon", "later"]
    registry.revoke_key("default", "soon")
    assert found(expiring=(NOON, NOON + 7 * DAY)) == []
    clock.now = NOON + 10 * DAY
    registry.begin_service_day()
    registry.record_uses({2: clock.now})
    assert found(unused_since=clock.now - 5 * DAY) == ["soon", "over", "never"]
    assert found(unused_since=clock.now - 20 * DAY) == []


# Realms


def test_a_realm_changes_in_what_is_given(registry: Registry) -> None:
    registry.found_realm(NewRealm(name="r", hint="one", idle_days=30, sessions_per_device=0))
    assert registry.update_realm("r", RealmChanges(hint="two", idle_days=None))
    assert not registry.update_realm("r", RealmChanges(hint="two"))
    realm = registry.realm("r")
    assert (realm.hint, realm.idle_days, realm.sessions_per_device, realm.devices) == ("two", None, 0, 0)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (NewRealm(name="r", secret=KEY), "whose keys are stored has no secret"),
        (NewRealm(name="r", enroll="first-use"), "needs a derived key source"),
        (NewRealm(name="r", key_source="derived-hmac", secret=Key(bytes(31))), "the secret has 31 bytes"),
        (NewRealm(name="r", key_source="else"), "key source 'else' is unknown"),  # type: ignore[arg-type]
        (NewRealm(name="r", idle_days=0), "idle days are 1 to 36500"),
        (NewRealm(name="r", sessions_per_device=-1), "sessions per device are 0 to 1000"),
        (NewRealm(name="default"), "is there already"),
    ],
)
def test_a_realm_that_cannot_be_is_refused(
    registry: Registry, engine: Engine, new: NewRealm, message: str
) -> None:
    before = everything(engine)
    with pytest.raises(RegistryRefused, match=message):
        registry.found_realm(new)
    assert everything(engine) == before


def test_a_realm_with_devices_goes_only_with_them(registry: Registry, engine: Engine) -> None:
    registry.found_realm(NewRealm(name="r", key_source="derived-hmac", secret=KEY))
    registry.add_device(NewDevice(identity="a", realm="r"))
    registry.add_device(NewDevice(identity="b", realm="r"))
    registry.remove_device("r", "b")
    registry.add_device(NewDevice(identity="kept"))
    before = everything(engine)
    with pytest.raises(RegistryRefused, match="realm 'r' has 1 device: remove them first"):
        registry.remove_realm("r")
    assert everything(engine) == before
    assert registry.remove_realm("r", with_devices=True) == 1
    assert [realm.name for realm in registry.realms()] == ["default"]
    assert [device.name for device in registry.devices()] == ["kept"]


@pytest.mark.parametrize("source", ["derived-hmac", "derived-hkdf"])
def test_a_derived_key_is_shown_and_not_stored(registry: Registry, engine: Engine, source: Any) -> None:
    made = registry.found_realm(NewRealm(name="r", key_source=source))
    assert made.secret is not None
    added = registry.add_device(NewDevice(identity="a", realm="r"))
    again = registry.rotate_key("r", "a", NewCredential())
    assert len({added.key, again.key}) == 2
    with engine.connect() as connection:
        assert {row.sealed_key for row in connection.execute(select(schema.credentials))} == {b""}
    for refused in (
        lambda: registry.add_device(NewDevice(identity="b", realm="r", key=KEY)),
        lambda: registry.rotate_key("r", "a", NewCredential(key=KEY)),
    ):
        before = everything(engine)
        with pytest.raises(RegistryRefused, match=f"are derived \\({source}\\): give no key"):
            refused()
        assert everything(engine) == before


def test_a_removed_device_of_derived_keys_leaves_a_tombstone(registry: Registry, engine: Engine) -> None:
    registry.found_realm(NewRealm(name="r", key_source="derived-hmac", secret=KEY, enroll="first-use"))
    realm_id = registry.realm("r").id
    assert registry.enrol_device(realm_id, "a", "192.0.2.1") is not None
    assert registry.enrol_device(realm_id, "a", "192.0.2.1") is None
    registry.add_device(NewDevice(identity="other", realm="r"))
    registry.remove_device("r", "a")
    with engine.connect() as connection:
        (record,) = [
            record for key, record in next(feed.credential_pages(connection)).items() if key.endswith(b"a")
        ]
    assert (record.revoked, record.credential_id, record.device) == (True, 0, "a")
    with pytest.raises(RegistryRefused, match="'a' was removed"):
        registry.enrol_device(realm_id, "a", "192.0.2.1")
    with pytest.raises(RegistryRefused, match="'a' was removed"):
        registry.rotate_key("r", "other", NewCredential(identity="a"))
    registry.add_device(NewDevice(identity="a", realm="r"))
    assert registry.device("r", "a").credentials[0].revoked_at is None
    registry.update_realm("r", RealmChanges(enroll="registered"))
    with pytest.raises(RegistryRefused, match="enrols nobody"):
        registry.enrol_device(realm_id, "b", "192.0.2.1")
    (row,) = [row for row in registry.audit_rows() if row.action == "enrol-device"]
    assert row.details == {"address": "192.0.2.1", "hash": "sha256", "identity": "a"}


# Last use


def test_idle_days_are_days_of_service(registry: Registry, clock: Clock, engine: Engine) -> None:
    registry.update_realm("default", RealmChanges(idle_days=2))
    assert registry.begin_service_day()
    assert not registry.begin_service_day()
    registry.add_device(NewDevice(identity="m"))

    def state() -> tuple[int, bool]:
        with engine.connect() as connection:
            (realm,) = feed.realms(connection)
        return realm.service_day, registry.device("default", "m").credentials[0].is_idle

    assert registry.record_uses({1: clock.now}) == 1
    assert registry.record_uses({1: clock.now}) == 0, "once a day"
    clock.now += 100 * DAY
    assert state() == (1, False), "nobody served these days"
    for day, idle in ((2, False), (3, False), (4, True)):
        registry.begin_service_day()
        assert state() == (day, idle)
        clock.now += DAY
    clock.now -= 50 * DAY
    assert not registry.begin_service_day(), "a clock that goes back counts nothing"
    clock.now += 50 * DAY
    rows = len(list(registry.audit_rows()))
    assert registry.record_uses({1: clock.now, 99: clock.now}) == 1
    assert state() == (4, False)
    assert len(list(registry.audit_rows())) == rows
    assert registry.device("default", "m").credentials[0].last_used_at == clock.now


def test_a_use_is_a_change_that_names_its_credentials_alone(registry: Registry, engine: Engine) -> None:
    registry.begin_service_day()
    for number in range(5):
        registry.add_device(NewDevice(identity=f"m{number}"))
    with engine.connect() as connection:
        before = feed.head(connection).sequence
    registry.record_uses({2: NOON, 4: NOON})
    with engine.connect() as connection:
        (change,) = feed.changes_after(connection, before, 10)
        assert change.is_use
        used = feed.credentials_used(connection, before, change.sequence)
        assert {record.device for record in used.values()} == {"m1", "m3"}
        assert feed.credentials_of_devices(connection, [(change.first_id, change.last_id)]) == {}
        assert feed.credential_states(connection, NOON.timestamp())["active"] == 5


# Resealing


def test_resealing_goes_on_where_it_was_interrupted(
    registry: Registry,
    settings: RegistrySettings,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resealing, "_CREDENTIALS_PER_STEP", 2)
    keys = {name: registry.add_device(NewDevice(identity=name)).key for name in "abcde"}
    registry.found_realm(NewRealm(name="r", key_source="derived-hmac"))
    derived = registry.add_device(NewDevice(identity="x", realm="r")).key
    path = settings.master_key_file
    old = path.read_text()
    path.write_text("ab" * 32 + "\n" + old)
    with Registry(settings, Author("bob", "console")) as resealer:
        steps = resealer.reseal()
        assert (next(steps).resealed, next(steps).resealed) == (2, 4)
        del steps
    with Registry(settings, Author("bob", "console")) as resealer:
        assert [step.resealed for step in resealer.reseal()] == [0, 0, 1, 5], (
            "one key, a realm, three secrets"
        )
        assert [step.resealed for step in resealer.reseal()] == [0, 0, 0, 0]
    path.write_text("ab" * 32)
    sealer = Sealer(settings.master_keys().load())
    with engine.connect() as connection:
        for row in connection.execute(select(schema.credentials).where(schema.credentials.c.realm_id == 1)):
            opened = sealer.open(row.sealed_key, credential_context(1, row.identity.encode()))
            assert opened == keys[row.identity].reveal()
    with Registry(settings, Author("bob", "console")) as after:
        assert after.verify_audit().faults == []
        assert after.rotate_key("r", "x", NewCredential(identity="y")).key != derived
        assert after.add_device(NewDevice(identity="f", key=keys["a"])).same_key_as == ("default/a",)
    path.write_text(old)
    with pytest.raises(RegistryMismatch, match="does not open this registry"):
        Registry(settings, Author("bob", "console")).open()


def test_what_is_sealed_under_a_lost_key_is_named(registry: Registry, settings: RegistrySettings) -> None:
    registry.add_device(NewDevice(identity="a"))
    path = settings.master_key_file
    path.write_text("cd" * 32 + "\n" + path.read_text())
    with Registry(settings, Author("bob", "console")) as other:
        other.add_device(NewDevice(identity="b"))
    path.write_text("ef" * 32 + "\n" + path.read_text().splitlines()[1])
    with (
        Registry(settings, Author("bob", "console")) as lacking,
        pytest.raises(RegistryMismatch, match="which is not configured"),
    ):
        list(lacking.reseal())
