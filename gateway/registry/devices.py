"""Devices as they are written: added, enrolled, changed, switched off, removed."""

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import RegistryRefused
from gateway.registry import commands, identities, schema
from gateway.registry.credentials import (
    check_window,
    credential_columns,
    new_key,
    same_key_as,
    set_window,
)
from gateway.registry.ledger import Entry, Ledger
from gateway.registry.realms import UNCHANGED, KnownRealm, Unchanged, known_realm
from gateway.registry.records import PskHash
from gateway.registry.sealing import Key
from gateway.registry.usage import first_day
from gateway.registry.vault import Vault

__all__ = [
    "AddedDevice",
    "DeviceChanges",
    "KnownDevice",
    "NewDevice",
    "add_device",
    "enrol_device",
    "known_device",
    "queue_command",
    "remove_device",
    "set_device_enabled",
    "unknown_device",
    "update_device",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDevice:
    """What `Registry.add_device` is asked for: texts as people write them, checked there.

    The device gets the name `identity` and one credential. Without a `key` a random one of 32 bytes is made, or it is
    derived where the realm says so.
    """

    identity: str
    realm: str = "default"
    group: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    key: Key | None = None
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None
    networks: Iterable[str] = ()
    hash: PskHash = "sha256"


@dataclass(frozen=True, slots=True)
class AddedDevice:
    """A device as it was added, with its key: the only time that it is shown."""

    realm: str
    device: str
    identity: str
    key: Key
    hint: str | None
    group: str | None
    labels: dict[str, str]
    sequence: int
    same_key_as: tuple[str, ...] = ()
    """Other identities with this very key, as `realm/identity`, a few at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChanges:
    """What is to be otherwise. A window is that of one credential: of `identity`, or of the only one there is."""

    group: str | Unchanged | None = UNCHANGED
    labels: Mapping[str, str] = field(default_factory=dict)
    labels_removed: Iterable[str] = ()
    networks: Iterable[str] | Unchanged = UNCHANGED
    identity: str | None = None
    not_before: dt.datetime | Unchanged | None = UNCHANGED
    not_after: dt.datetime | Unchanged | None = UNCHANGED


class KnownDevice(NamedTuple):
    """What writers need to know of a device."""

    id: int
    disabled: bool
    realm: KnownRealm


def add_device(connection: Connection, ledger: Ledger, vault: Vault, new: NewDevice) -> AddedDevice:
    """Raises RegistryRefused: an invalid value, an unknown realm, an identity or name that is taken."""
    draft = _checked(new)
    realm = known_realm(connection, new.realm)
    tombstones = schema.tombstones.c
    connection.execute(
        delete(schema.tombstones).where(
            tombstones.realm_id == realm.id, tombstones.identity == draft.identity
        )
    )
    return _insert(connection, ledger, vault, realm, draft, "add-device", {})


def enrol_device(  # noqa: PLR0917 - connection, ledger and vault come first in every write
    connection: Connection, ledger: Ledger, vault: Vault, realm_id: int, identity: str, address: str
) -> AddedDevice | None:
    """Add a device that proved the key which its realm derives for it; None when it is there already.

    Raises:
        RegistryRefused: the realm is gone or enrols nobody, or the identity was removed or is taken.

    """
    name = connection.execute(select(schema.realms.c.name).where(schema.realms.c.id == realm_id)).scalar()
    realm = None if name is None else known_realm(connection, name)
    if realm is None or realm.enroll != "first-use":
        raise RegistryRefused(f"realm {name!r} enrols nobody any more")
    table = schema.credentials.c
    if connection.execute(
        select(table.id).where(table.realm_id == realm_id, table.identity == identity)
    ).first():
        return None
    tombstones = schema.tombstones.c
    if connection.execute(
        select(tombstones.id).where(tombstones.realm_id == realm_id, tombstones.identity == identity)
    ).first():
        raise RegistryRefused(f"{identity!r} was removed: `gatewayctl add-device` lets it in again")
    draft = _checked(NewDevice(identity=identity, realm=realm.name))
    return _insert(connection, ledger, vault, realm, draft, "enrol-device", {"address": address})


def _insert(  # noqa: PLR0917 - as above
    connection: Connection,
    ledger: Ledger,
    vault: Vault,
    realm: KnownRealm,
    draft: "_Draft",
    action: str,
    detail: Mapping[str, Any],
) -> AddedDevice:
    _check_free(connection, realm, draft.identity)
    key, sealed_key = new_key(vault, realm, draft.identity, draft.key)
    created_at = ledger.now()
    try:
        device = connection.execute(
            insert(schema.devices).values(
                realm_id=realm.id,
                name=draft.identity,
                group_name=draft.group,
                labels=msgspec.json.encode(draft.labels).decode(),
                networks=msgspec.json.encode(draft.networks).decode(),
                disabled=False,
                created_at=created_at,
            )
        )
        device_id = _new_id(device.inserted_primary_key)
        connection.execute(
            insert(schema.credentials).values(
                **credential_columns(
                    device_id, realm.id, draft.identity, draft.hash, created_at, first_day(connection)
                ),
                sealed_key=sealed_key,
                fingerprint=vault.fingerprint(key),
                not_before=draft.not_before,
                not_after=draft.not_after,
            )
        )
    except IntegrityError as exc:  # somebody else added it between our look and our insert
        raise RegistryRefused(f"{draft.identity!r} is taken in realm {realm.name!r}") from exc
    same = same_key_as(connection, vault.fingerprint(key), realm.id, draft.identity)
    subject = f"{realm.name}/{draft.identity}"
    sequence = ledger.record(
        connection,
        Entry("device", device_id, device_id, action, subject, {**draft.audited(), **detail}),
    )
    return AddedDevice(
        realm.name,
        draft.identity,
        draft.identity,
        key,
        realm.hint,
        draft.group,
        draft.labels,
        sequence,
        same,
    )


def set_device_enabled(
    connection: Connection, ledger: Ledger, realm: str, name: str, *, enabled: bool
) -> bool:
    """Whether that changed anything. Raises RegistryRefused: there is no such device."""
    device = known_device(connection, realm, name)
    if device.disabled == (not enabled):
        return False
    connection.execute(
        update(schema.devices).where(schema.devices.c.id == device.id).values(disabled=not enabled)
    )
    action = "enable-device" if enabled else "disable-device"
    ledger.record(connection, Entry("device", device.id, device.id, action, f"{realm}/{name}"))
    return True


def update_device(
    connection: Connection, ledger: Ledger, realm: str, name: str, changes: DeviceChanges
) -> bool:
    """Whether that changed anything. Raises RegistryRefused: unknown device or identity, or an invalid value."""
    device = known_device(connection, realm, name)
    values = _changed_columns(connection, device.id, changes)
    detail: dict[str, Any] = {
        key: msgspec.json.decode(value) if key in {"labels", "networks"} else value
        for key, value in values.items()
    }
    if values:
        connection.execute(update(schema.devices).where(schema.devices.c.id == device.id).values(**values))
    if changes.not_before is not UNCHANGED or changes.not_after is not UNCHANGED:
        detail |= set_window(connection, device.id, changes.identity, changes.not_before, changes.not_after)
    elif changes.identity is not None:
        raise RegistryRefused("an identity is named, but no window for it: give --not-before or --not-after")
    if not detail:
        return False
    ledger.record(
        connection, Entry("device", device.id, device.id, "update-device", f"{realm}/{name}", detail)
    )
    return True


def _changed_columns(connection: Connection, device_id: int, changes: DeviceChanges) -> dict[str, Any]:
    """Column -> value, of what differs from what is there."""
    table = schema.devices.c
    row = connection.execute(
        select(table.group_name, table.labels, table.networks).where(table.id == device_id)
    ).one()
    values: dict[str, Any] = {}
    if changes.group is not UNCHANGED:
        values["group_name"] = None if changes.group is None else identities.parse_group(changes.group)
    labels = msgspec.json.decode(row.labels, type=dict[str, str]) | dict(changes.labels)
    for key in changes.labels_removed:
        labels.pop(key, None)
    values["labels"] = msgspec.json.encode(identities.parse_labels(labels)).decode()
    if changes.networks is not UNCHANGED:
        values["networks"] = msgspec.json.encode(identities.parse_networks(changes.networks)).decode()
    return {key: value for key, value in values.items() if getattr(row, key) != value}


def remove_device(connection: Connection, ledger: Ledger, realm: str, name: str) -> None:
    """Remove a device and its credentials; where keys are derived, tombstones keep its identities out.

    Raises RegistryRefused: there is no such device.
    """
    device = known_device(connection, realm, name)
    credentials = schema.credentials
    found = connection.scalars(
        select(credentials.c.identity).where(credentials.c.device_id == device.id)
    ).all()
    connection.execute(delete(credentials).where(credentials.c.device_id == device.id))
    connection.execute(delete(schema.devices).where(schema.devices.c.id == device.id))
    if device.realm.is_derived and found:
        connection.execute(
            insert(schema.tombstones),
            [
                {
                    "device_id": device.id,
                    "realm_id": device.realm.id,
                    "identity": identity,
                    "created_at": ledger.now(),
                }
                for identity in found
            ],
        )
    detail = {"identities": list(found)}
    ledger.record(
        connection, Entry("device", device.id, device.id, "remove-device", f"{realm}/{name}", detail)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A new device whose every value was checked."""

    identity: str
    group: str | None
    labels: dict[str, str]
    key: Key | None
    not_before: dt.datetime | None
    not_after: dt.datetime | None
    networks: tuple[str, ...]
    hash: PskHash

    def audited(self) -> dict[str, Any]:
        """What the audit says of it: what differs from the defaults, and never the key."""
        detail = {
            "identity": self.identity,
            "group": self.group,
            "labels": self.labels,
            "not_before": self.not_before,
            "not_after": self.not_after,
            "networks": self.networks,
            "hash": self.hash,
        }
        return {name: value for name, value in detail.items() if value}


def _checked(new: NewDevice) -> _Draft:
    check_window(new.not_before, new.not_after)
    return _Draft(
        identity=identities.parse_identity(new.identity),
        group=None if new.group is None else identities.parse_group(new.group),
        labels=identities.parse_labels(new.labels),
        key=None if new.key is None else identities.check_key(new.key),
        not_before=new.not_before,
        not_after=new.not_after,
        networks=identities.parse_networks(new.networks),
        hash=new.hash,
    )


def _check_free(connection: Connection, realm: KnownRealm, identity: str) -> None:
    devices, credentials = schema.devices.c, schema.credentials.c
    taken = select(credentials.id).where(credentials.realm_id == realm.id, credentials.identity == identity)
    if connection.execute(taken).first() is not None:
        raise RegistryRefused(f"identity {identity!r} is taken in realm {realm.name!r}")
    taken = select(devices.id).where(devices.realm_id == realm.id, devices.name == identity)
    if connection.execute(taken).first() is not None:
        raise RegistryRefused(f"device {identity!r} is there already in realm {realm.name!r}")


def queue_command(  # noqa: PLR0917 - as above
    connection: Connection,
    ledger: Ledger,
    realm: str,
    name: str,
    command_id: str,
    payload: bytes,
    ttl: dt.timedelta,
) -> dt.datetime:
    """Let a command wait for a device; when it expires.

    Raises RegistryRefused: there is no such device, or see `commands.add_command`.
    """
    device = known_device(connection, realm, name)
    created_at = ledger.now()
    expires_at = created_at + ttl
    commands.add_command(
        connection,
        device_id=device.id,
        command_id=command_id,
        payload=payload,
        created_at=created_at,
        expires_at=expires_at,
    )
    detail = {"command": command_id, "bytes": len(payload), "expires_at": expires_at}
    ledger.record(
        connection, Entry("device", device.id, device.id, "queue-command", f"{realm}/{name}", detail)
    )
    return expires_at


def known_device(connection: Connection, realm_name: str, name: str) -> KnownDevice:
    """The device, locked until the end of the transaction where the database locks rows."""
    devices = schema.devices.c
    name = identities.parse_device_name(name)
    realm = known_realm(connection, realm_name)
    query = select(devices.id, devices.disabled).where(devices.realm_id == realm.id, devices.name == name)
    row = connection.execute(query.with_for_update()).first()
    if row is None:
        raise unknown_device(realm_name, name)
    return KnownDevice(row.id, row.disabled, realm)


def unknown_device(realm: str, name: str) -> RegistryRefused:
    return RegistryRefused(
        f"device {name!r} does not exist in realm {realm!r}: `gatewayctl list-devices` shows all"
    )


def _new_id(primary_key: Sequence[Any] | None) -> int:
    assert primary_key is not None, "every table here numbers its rows itself"
    return int(primary_key[0])
