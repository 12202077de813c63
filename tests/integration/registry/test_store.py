"""What commands do to the registry, the same on every database."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, select

from gateway.errors import ConfigurationError, RegistryMismatch, RegistryRefused, RegistryUnavailable
from gateway.registry import ledger, schema
from gateway.registry.founding import initialise
from gateway.registry.ledger import Author
from gateway.registry.listing import DeviceFilter
from gateway.registry.migrate import migrate
from gateway.registry.sealing import Key, MasterKey, Sealer, credential_context
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry

NOON = dt.datetime(2030, 1, 2, 12, 0, 0, 123456, tzinfo=dt.UTC)
KEY = Key(bytes(range(32)))


def rows(engine: Engine, table: Any) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        order = table.primary_key.columns
        return [dict(row._mapping) for row in connection.execute(select(table).order_by(*order))]


def everything(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    return {table.name: rows(engine, table) for table in schema.metadata.sorted_tables}


def test_a_new_registry_has_a_realm_and_a_feed(registry: Registry, engine: Engine) -> None:
    assert [(realm.name, realm.hint) for realm in registry.realms()] == [("default", None)]
    (feed,) = rows(engine, schema.feed)
    assert (feed["id"], feed["sequence"], feed["pruned_through"]) == (1, 1, 0)
    assert {row["name"] for row in rows(engine, schema.secrets)} == {"fingerprint", "decoy", "audit"}


def test_founding_again_changes_nothing(settings: RegistrySettings, engine: Engine) -> None:
    before = everything(engine)
    assert not initialise(settings, Author("bob", "elsewhere"))
    assert everything(engine) == before


def test_an_added_device_is_there_with_its_key_sealed(
    registry: Registry, settings: RegistrySettings, engine: Engine
) -> None:
    added = registry.add_device(
        NewDevice(
            identity="meter-1",
            group="meters",
            labels={"site": "north", "floor": "2"},
            key=KEY,
            not_before=NOON,
            not_after=NOON + dt.timedelta(days=30),
            networks=["10.0.0.0/8", "2001:db8::/32"],
            hash="sha384",
        )
    )
    assert (added.realm, added.device, added.identity, added.hint) == ("default", "meter-1", "meter-1", None)
    assert added.key == KEY

    device = registry.device("default", "meter-1")
    assert (device.realm, device.name, device.group, device.disabled) == (
        "default",
        "meter-1",
        "meters",
        False,
    )
    assert device.labels == {"floor": "2", "site": "north"}
    assert device.networks == ("10.0.0.0/8", "2001:db8::/32")
    assert device.created_at == NOON
    (credential,) = device.credentials
    assert (credential.identity, credential.hash, credential.revoked_at) == ("meter-1", "sha384", None)
    assert (credential.not_before, credential.not_after) == (NOON, NOON + dt.timedelta(days=30))

    (row,) = rows(engine, schema.credentials)
    sealer = Sealer([MasterKey.from_file(settings.master_key_file)])
    assert sealer.open(row["sealed_key"], credential_context(row["realm_id"], b"meter-1")) == KEY.reveal()
    assert len(row["fingerprint"]) == 16


def test_a_key_is_made_when_none_is_given(registry: Registry) -> None:
    one, other = (registry.add_device(NewDevice(identity=name)).key for name in ("a", "b"))
    assert len(one) == len(other) == 32
    assert one != other


def test_no_key_is_readable_in_any_table(registry: Registry, engine: Engine) -> None:
    registry.add_device(NewDevice(identity="meter-1", key=KEY))
    text = repr(everything(engine))
    assert KEY.hex() not in text
    assert repr(KEY.reveal())[2:-1] not in text


def test_the_same_key_has_the_same_fingerprint(registry: Registry, engine: Engine) -> None:
    for identity, key in (("a", KEY), ("b", KEY), ("c", None)):
        registry.add_device(NewDevice(identity=identity, key=key))
    a, b, c = (row["fingerprint"] for row in rows(engine, schema.credentials))
    assert a == b != c


def test_every_write_has_one_change_and_one_audit_entry(registry: Registry, engine: Engine) -> None:
    realm = registry.add_realm("plant", hint="plant-7")
    registry.add_device(NewDevice(identity="m", realm="plant", group="g", key=KEY))
    registry.set_device_enabled("plant", "m", enabled=False)
    registry.set_device_enabled("plant", "m", enabled=True)
    device_id = registry.device("plant", "m").id
    registry.remove_device("plant", "m")

    audit = rows(engine, schema.audit)
    assert [(row["sequence"], row["action"], row["subject"]) for row in audit] == [
        (1, "add-realm", "default"),
        (2, "add-realm", "plant"),
        (3, "add-device", "plant/m"),
        (4, "disable-device", "plant/m"),
        (5, "enable-device", "plant/m"),
        (6, "remove-device", "plant/m"),
    ]
    assert {(row["actor"], row["source"], row["at"]) for row in audit} == {("alice", "console.example", NOON)}
    assert json.loads(audit[2]["detail"]) == {"identity": "m", "group": "g", "hash": "sha256"}
    assert json.loads(audit[5]["detail"]) == {"identities": ["m"]}

    changes = rows(engine, schema.changes)
    assert [(row["sequence"], row["scope"], row["first_id"], row["last_id"]) for row in changes] == [
        (1, "realm", 1, 1),
        (2, "realm", realm.id, realm.id),
        *((sequence, "device", device_id, device_id) for sequence in (3, 4, 5, 6)),
    ]
    assert rows(engine, schema.feed)[0]["sequence"] == 6


def test_disabling_twice_is_no_change(registry: Registry, engine: Engine) -> None:
    registry.add_device(NewDevice(identity="m"))
    assert registry.set_device_enabled("default", "m", enabled=False)
    before = everything(engine)
    assert not registry.set_device_enabled("default", "m", enabled=False)
    assert everything(engine) == before
    assert registry.device("default", "m").disabled


def test_ids_are_never_used_again(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="m"))
    first = registry.device("default", "m").id
    registry.remove_device("default", "m")
    registry.add_device(NewDevice(identity="m"))
    assert registry.device("default", "m").id > first


def test_names_are_compared_byte_by_byte(registry: Registry) -> None:
    names = ["meter", "Meter", "méter", "me\u0301ter", "meter ", "mëter"]
    for name in names:
        registry.add_device(NewDevice(identity=name))
    assert [device.name for device in registry.devices()] == names
    assert registry.device("default", "Meter").name == "Meter"
    with pytest.raises(RegistryRefused):
        registry.device("default", "METER")


def test_an_identity_is_free_in_another_realm(registry: Registry) -> None:
    registry.add_realm("plant")
    registry.add_device(NewDevice(identity="m"))
    registry.add_device(NewDevice(identity="m", realm="plant"))
    assert [device.realm for device in registry.devices()] == ["default", "plant"]


WRONG = {
    "empty": (NewDevice(identity=""), "the identity is empty"),
    "too long": (NewDevice(identity="é" * 65), "the identity has 130 bytes: at most 128 are allowed"),
    "control characters": (NewDevice(identity="a\x1bb"), r"the identity 'a\\x1bb' has control characters"),
    "not UTF-8": (NewDevice(identity="a\udcff"), "the identity is not UTF-8"),
    "short key": (NewDevice(identity="m", key=Key(bytes(15))), "the key has 15 bytes: 16 to 64 are allowed"),
    "long key": (NewDevice(identity="m", key=Key(bytes(65))), "the key has 65 bytes: at most 64"),
    "taken": (NewDevice(identity="taken"), "identity 'taken' is taken in realm 'default'"),
    "realm": (NewDevice(identity="m", realm="nowhere"), "realm 'nowhere' does not exist"),
    "window": (
        NewDevice(identity="m", not_before=NOON, not_after=NOON),
        "not-before must be earlier than not-after",
    ),
    "network": (NewDevice(identity="m", networks=["10.0.0.1/8"]), "is 10.0.0.0/8 meant"),
    "group": (NewDevice(identity="m", group=""), "a group has 1 to 64 characters"),
    "label": (NewDevice(identity="m", labels={"a b": ""}), "label 'a b': a label key has"),
}


@pytest.mark.parametrize(("new", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_device_is_refused_and_nothing_is_written(
    registry: Registry, engine: Engine, new: NewDevice, message: str
) -> None:
    registry.add_device(NewDevice(identity="taken"))
    before = everything(engine)
    with pytest.raises(RegistryRefused, match=message) as refusal:
        registry.add_device(new)
    assert "\n" not in str(refusal.value)
    assert everything(engine) == before


def test_wrong_realms_are_refused_and_nothing_is_written(registry: Registry, engine: Engine) -> None:
    before = everything(engine)
    for name, hint, message in (
        ("default", None, "realm 'default' is there already"),
        ("", None, "1 to 64 characters"),
        ("x", "", "the hint is empty"),
        ("x", "a\nb", "control characters"),
    ):
        with pytest.raises(RegistryRefused, match=message):
            registry.add_realm(name, hint=hint)
    assert everything(engine) == before


@pytest.mark.parametrize("name", ["nobody", "a\x00b", "\udcff", "x" * 300])
def test_an_unknown_device_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryRefused):
        registry.device("default", name)
    with pytest.raises(RegistryRefused):
        registry.remove_device("default", name)
    with pytest.raises(RegistryRefused):
        registry.set_device_enabled("default", name, enabled=True)
    with pytest.raises(RegistryRefused):
        registry.devices(DeviceFilter(realm=name))


def test_devices_are_listed_page_by_page(registry: Registry) -> None:
    for number in range(7):
        registry.add_device(NewDevice(identity=f"m-{number}"))
    names = []
    after = 0
    while page := registry.devices(limit=3, after=after):
        assert len(page) <= 3
        names += [device.name for device in page]
        after = page[-1].id
    assert names == [f"m-{number}" for number in range(7)]


def test_devices_are_filtered(registry: Registry) -> None:
    registry.add_realm("plant")
    for name, realm, group, labels in (
        ("a", "default", "meters", {"site": "north"}),
        ("b", "default", "meters", {"site": 'no"rth', "xsite": "north"}),
        ("c", "default", "Meters", {"site": "North", "note": '"site":"north"'}),
        ("d", "plant", "meters", {"site": "north", "size": "ä%_"}),
    ):
        registry.add_device(NewDevice(identity=name, realm=realm, group=group, labels=labels))

    def names(**wanted: Any) -> str:
        return "".join(device.name for device in registry.devices(DeviceFilter(**wanted)))

    assert names() == "abcd"
    assert names(realm="plant") == "d"
    assert names(group="meters") == "abd"
    assert names(group="meters", realm="default") == "ab"
    assert names(labels={"site": "north"}) == "ad"
    assert names(labels={"site": 'no"rth'}) == "b"
    assert names(labels={"xsite": "north"}) == "b"
    assert names(labels={"site": "north", "size": "ä%_"}) == "d"
    assert names(labels={"size": "ä%%"}) == ""


def test_old_changes_are_pruned_and_the_feed_says_so(
    registry: Registry, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_CHANGES_KEPT", 4)
    monkeypatch.setattr(ledger, "_PRUNE_EVERY", 3)
    for number in range(9):
        registry.add_device(NewDevice(identity=f"m-{number}"))
    (feed,) = rows(engine, schema.feed)
    assert (feed["sequence"], feed["pruned_through"]) == (10, 5)
    assert [row["sequence"] for row in rows(engine, schema.changes)] == [6, 7, 8, 9, 10]
    assert len(rows(engine, schema.audit)) == 10


def test_a_wrong_master_key_is_named_and_nothing_opens(settings: RegistrySettings, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    MasterKey.generate().write(other)
    wrong = settings.model_copy(update={"master_key_file": other})
    with pytest.raises(RegistryMismatch, match=f"the master key in {other} does not open this registry"):
        Registry(wrong, Author("a", "b")).open()
    with pytest.raises(RegistryMismatch, match="does not open this registry"):
        initialise(wrong, Author("a", "b"))


def test_a_missing_master_key_is_named(settings: RegistrySettings) -> None:
    settings.master_key_file.unlink()
    with pytest.raises(ConfigurationError, match=f"{settings.master_key_file} does not exist"):
        Registry(settings, Author("a", "b")).open()


def test_a_database_without_tables_is_named(url: str, settings: RegistrySettings, engine: Engine) -> None:
    del url
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    with pytest.raises(RegistryMismatch, match="no tables yet: run `gatewayctl migrate`"):
        Registry(settings, Author("a", "b")).open()


def test_a_registry_that_was_never_founded_is_named(url: str, tmp_path: Path) -> None:
    migrate(url)
    MasterKey.generate().write(tmp_path / "master.key")
    settings = RegistrySettings(url=url, master_key_file=tmp_path / "master.key")
    with pytest.raises(RegistryMismatch, match="the registry is empty: run `gatewayctl migrate`"):
        Registry(settings, Author("a", "b")).open()


def test_a_lost_secret_is_named(settings: RegistrySettings, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(delete(schema.secrets).where(schema.secrets.c.name == "decoy"))
    with pytest.raises(RegistryMismatch, match="lacks its secret 'decoy': restore the database"):
        Registry(settings, Author("a", "b")).open()


def test_an_older_schema_is_named(settings: RegistrySettings, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(RegistryMismatch, match=r"schema 0000.*run `gatewayctl migrate`"):
        Registry(settings, Author("a", "b")).open()


def test_a_registry_that_is_away_is_unavailable(tmp_path: Path) -> None:
    MasterKey.generate().write(tmp_path / "master.key")
    for url in (f"sqlite:///{tmp_path}/none.db", f"postgresql://someone:secret@/db?host={tmp_path}"):
        settings = RegistrySettings(url=url, master_key_file=tmp_path / "master.key")
        with pytest.raises(RegistryUnavailable, match="is away") as refusal:
            Registry(settings, Author("a", "b")).open()
        assert "secret" not in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "none.db").exists()
