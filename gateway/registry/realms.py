"""Realms as they are written: tenants with a hint, a source of keys and limits."""

import enum
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import RegistryRefused
from gateway.registry import identities, schema
from gateway.registry.derivation import (
    KEY_SOURCES,
    REALM_SECRET_BYTES_MAX,
    REALM_SECRET_BYTES_MIN,
    KeySource,
)
from gateway.registry.ledger import Entry, Ledger, note_change
from gateway.registry.sealing import Key
from gateway.registry.vault import Vault

__all__ = [
    "IDLE_DAYS_MAX",
    "SESSIONS_MAX",
    "UNCHANGED",
    "AddedRealm",
    "KnownRealm",
    "NewRealm",
    "RealmChanges",
    "Unchanged",
    "add_realm",
    "find_realm",
    "known_realm",
    "remove_realm",
    "update_realm",
]

IDLE_DAYS_MAX: Final = 36_500
SESSIONS_MAX: Final = 1_000


class Unchanged(enum.Enum):
    """Says of one value of a change that it stays as it is; None would take it away."""

    UNCHANGED = enum.auto()


UNCHANGED: Final = Unchanged.UNCHANGED

Enroll = Literal["registered", "first-use"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRealm:
    """What `Registry.add_realm` is asked for. Without a `secret` a realm of derived keys gets one of 32 random bytes."""

    name: str
    hint: str | None = None
    record_bytes_max: int | None = None
    """Most plaintext bytes of a TLS record to its devices, 64 to 16384 (None: what TLS allows)."""
    key_source: KeySource = "stored"
    secret: Key | None = None
    enroll: Enroll = "registered"
    idle_days: int | None = None
    sessions_per_device: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmChanges:
    """What is to be otherwise; the key source stays, since every key of the realm hangs on it."""

    hint: str | Unchanged | None = UNCHANGED
    record_bytes_max: int | Unchanged | None = UNCHANGED
    enroll: Enroll | Unchanged = UNCHANGED
    idle_days: int | Unchanged | None = UNCHANGED
    sessions_per_device: int | Unchanged | None = UNCHANGED

    def given(self) -> dict[str, Any]:
        """Column -> value, of what is to change."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not UNCHANGED}


@dataclass(frozen=True, slots=True)
class AddedRealm:
    """A realm as it was added; a secret that was made for it is shown here, and never again."""

    name: str
    secret: Key | None


class KnownRealm(NamedTuple):
    """What writers need to know of a realm."""

    id: int
    name: str
    hint: str | None
    key_source: str
    sealed_secret: bytes
    enroll: str

    @property
    def is_derived(self) -> bool:
        return self.key_source != "stored"


def add_realm(connection: Connection, ledger: Ledger, vault: Vault, new: NewRealm) -> AddedRealm:
    """Raises RegistryRefused: a value is invalid, or the name is taken."""
    name = identities.parse_realm_name(new.name)
    values = _checked({name: getattr(new, name) for name in RealmChanges.__slots__}, new.key_source)
    secret = _checked_secret(new)
    if find_realm(connection, name) is not None:
        raise RegistryRefused(f"realm {name!r} is there already")
    try:
        result = connection.execute(
            insert(schema.realms).values(
                name=name, key_source=new.key_source, created_at=ledger.now(), **values
            )
        )
    except IntegrityError as exc:
        raise RegistryRefused(f"realm {name!r} is there already") from exc
    assert result.inserted_primary_key is not None
    (realm_id,) = result.inserted_primary_key
    if secret is not None:
        sealed = vault.seal_realm_secret(realm_id, secret)
        connection.execute(
            update(schema.realms).where(schema.realms.c.id == realm_id).values(sealed_secret=sealed)
        )
    detail = {key: value for key, value in values.items() if value is not None} | {
        "key_source": new.key_source
    }
    ledger.record(connection, Entry("realm", realm_id, realm_id, "add-realm", name, detail))
    return AddedRealm(name, secret if new.secret is None else None)


def _checked_secret(new: NewRealm) -> Key | None:
    if new.key_source not in KEY_SOURCES:
        raise RegistryRefused(
            f"key source {new.key_source!r} is unknown: it is one of {', '.join(KEY_SOURCES)}"
        )
    if new.key_source == "stored":
        if new.secret is not None:
            raise RegistryRefused("a realm whose keys are stored has no secret: give a derived key source")
        return None
    secret = Key.generate() if new.secret is None else new.secret
    if not REALM_SECRET_BYTES_MIN <= len(secret) <= REALM_SECRET_BYTES_MAX:
        raise RegistryRefused(
            f"the secret has {len(secret)} bytes: {REALM_SECRET_BYTES_MIN} to {REALM_SECRET_BYTES_MAX} are allowed"
        )
    return secret


def _checked(values: dict[str, Any], key_source: str) -> dict[str, Any]:
    """The values of columns, those that are there, each valid."""
    if values.get("hint") is not None:
        values["hint"] = identities.parse_hint(values["hint"])
    if values.get("record_bytes_max") is not None:
        identities.check_record_bytes(values["record_bytes_max"])
    if values.get("enroll", "registered") not in {"registered", "first-use"}:
        raise RegistryRefused(f"enroll is registered or first-use, not {values['enroll']!r}")
    if values.get("enroll") == "first-use" and key_source == "stored":
        raise RegistryRefused(
            "enroll first-use needs a derived key source: the key of an unknown device must come from somewhere"
        )
    _check_range("idle days", values.get("idle_days"), 1, IDLE_DAYS_MAX)
    _check_range("sessions per device", values.get("sessions_per_device"), 0, SESSIONS_MAX)
    return values


def _check_range(what: str, value: int | None, lowest: int, highest: int) -> None:
    if value is not None and not lowest <= value <= highest:
        raise RegistryRefused(f"{what} are {lowest} to {highest}, not {value}")


def update_realm(connection: Connection, ledger: Ledger, name: str, changes: RealmChanges) -> bool:
    """Whether that changed anything. Raises RegistryRefused: unknown realm, or an invalid value."""
    realm = known_realm(connection, name, lock=True)
    values = _checked(changes.given(), realm.key_source)
    table = schema.realms
    row = connection.execute(select(table).where(table.c.id == realm.id)).one()._mapping  # noqa: SLF001 - SQLAlchemy's documented name
    values = {key: value for key, value in values.items() if row[key] != value}
    if not values:
        return False
    connection.execute(update(table).where(table.c.id == realm.id).values(**values))
    ledger.record(connection, Entry("realm", realm.id, realm.id, "update-realm", name, values))
    return True


def remove_realm(connection: Connection, ledger: Ledger, name: str, *, with_devices: bool) -> int:
    """Remove a realm; how many devices went with it.

    Raises RegistryRefused: there is no such realm, or it has devices and they were not to go.
    """
    realm = known_realm(connection, name, lock=True)
    devices, credentials = schema.devices, schema.credentials
    count, first_id, last_id = connection.execute(
        select(func.count(), func.min(devices.c.id), func.max(devices.c.id)).where(
            devices.c.realm_id == realm.id
        )
    ).one()
    if count and not with_devices:
        raise RegistryRefused(
            f"realm {name!r} has {count} device{'s' if count > 1 else ''}: remove them first, or with it by --with-devices"
        )
    for table in (credentials, devices, schema.tombstones, schema.imports):
        connection.execute(delete(table).where(table.c.realm_id == realm.id))
    connection.execute(delete(schema.realms).where(schema.realms.c.id == realm.id))
    if count:
        note_change(connection, "device", first_id, last_id, ledger.now())
    ledger.record(connection, Entry("realm", realm.id, realm.id, "remove-realm", name, {"devices": count}))
    return int(count)


def find_realm(connection: Connection, name: str, *, lock: bool = False) -> KnownRealm | None:
    realms = schema.realms.c
    query = select(
        realms.id, realms.name, realms.hint, realms.key_source, realms.sealed_secret, realms.enroll
    ).where(realms.name == name)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        return None
    return KnownRealm(*row)._replace(sealed_secret=bytes(row.sealed_secret or b""))


def known_realm(connection: Connection, name: str, *, lock: bool = False) -> KnownRealm:
    """The realm; with `lock`, nobody else changes it until the end of the transaction."""
    realm = find_realm(connection, identities.parse_realm_name(name), lock=lock)
    if realm is None:
        raise RegistryRefused(f"realm {name!r} does not exist: `gatewayctl list-realms` shows those that do")
    return realm
