"""What becomes of the devices of a file: each is held against the registry as it is now.

The check before an import and the import itself ask this module, so they cannot differ.
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import Connection, select

from gateway.errors import RegistryRefused
from gateway.registry import identities, schema
from gateway.registry.credentials import check_window
from gateway.registry.formats.base import FileCredential, FileDevice
from gateway.registry.formats.source import BadLine
from gateway.registry.realms import UNCHANGED, KnownRealm, Unchanged
from gateway.registry.sealing import Key
from gateway.registry.vault import Vault

__all__ = ["Add", "KeyedIdentity", "OnConflict", "Planner", "Same", "Skip", "Step", "Update"]

OnConflict = Literal["fail", "skip", "update"]
"""What to do with a device whose name or identity is there already."""


class KeyedIdentity(msgspec.Struct, frozen=True):
    """A credential that is to be added; `values` are its columns but for the key."""

    identity: str
    key: Key | None
    values: dict[str, Any]


class Add(msgspec.Struct, frozen=True):
    """A new device; `values` are its columns."""

    device: FileDevice
    name: str
    values: dict[str, Any]
    credentials: list[KeyedIdentity]


@dataclass(slots=True)
class Update:
    """A device that is there, and what differs: its own columns, those of its credentials, and new credentials."""

    device: FileDevice
    name: str
    device_id: int
    values: dict[str, Any]
    credentials: list[dict[str, Any]] = field(default_factory=list)
    keys: list[tuple[int, str, Key]] = field(default_factory=list)
    """Credential id, identity and new key."""
    added: list[KeyedIdentity] = field(default_factory=list)
    changes: set[str] = field(default_factory=set)
    """Names of what changes, for people."""


@dataclass(frozen=True, slots=True)
class Same:
    """A device that is there as the file says."""

    device: FileDevice
    name: str


@dataclass(frozen=True, slots=True)
class Skip:
    """A device that is there and stays as it is."""

    device: FileDevice
    name: str


Step = Add | Update | Same | Skip | BadLine


class _Known(NamedTuple):
    """What the registry has of some devices of a file."""

    credentials: dict[str, Any]
    """By identity."""
    devices: dict[int, Any]
    named: dict[str, int]


@dataclass(frozen=True, slots=True)
class Planner:
    """Decides for one realm; `labels` are given to every device, `group` to those that have none in the file."""

    vault: Vault
    realm: KnownRealm
    on_conflict: OnConflict
    group: str | None
    labels: Mapping[str, str]

    def plan(self, connection: Connection, devices: Sequence[FileDevice]) -> list[Step]:
        """A step for each device, in their order."""
        known = self._known(connection, devices)
        return [self._step(device, known) for device in devices]

    def _known(self, connection: Connection, devices: Sequence[FileDevice]) -> _Known:
        table, device_table = schema.credentials.c, schema.devices.c
        wanted = [each.identity for device in devices for each in device.credentials]
        rows = connection.execute(
            select(
                table.id,
                table.device_id,
                table.identity,
                table.fingerprint,
                table.hash,
                table.not_before,
                table.not_after,
                table.revoked_at,
            ).where(table.realm_id == self.realm.id, table.identity.in_(wanted))
        )
        credentials = {row.identity: row for row in rows}
        of_device = select(
            device_table.id,
            device_table.name,
            device_table.group_name,
            device_table.labels,
            device_table.networks,
            device_table.disabled,
        )
        names = [_name(device) for device in devices]
        found = list(
            connection.execute(
                of_device.where(device_table.realm_id == self.realm.id, device_table.name.in_(names))
            )
        )
        # Asked for apart: with an OR of both, SQLite reads every device of the realm.
        others = {row.device_id for row in credentials.values()} - {row.id for row in found}
        if others:
            found += connection.execute(of_device.where(device_table.id.in_(others)))
        return _Known(credentials, {row.id: row for row in found}, {row.name: row.id for row in found})

    def _step(self, device: FileDevice, known: _Known) -> Step:
        try:
            return self._decided(device, known)
        except RegistryRefused as exc:
            return BadLine(device.line, str(exc))

    def _decided(self, device: FileDevice, known: _Known) -> Step:
        self._check_keys(device)
        name = _name(device)
        owners = {
            known.credentials[each].device_id for each in _identities(device) if each in known.credentials
        }
        if name in known.named and (device.name is not None or not owners):
            owners.add(known.named[name])
        if not owners:
            return self._add(device, name)
        if self.on_conflict == "skip":
            return Skip(device, name)
        if self.on_conflict == "fail":
            raise RegistryRefused(self._conflict(device, name, known))
        if len(owners) > 1:
            raise RegistryRefused("its name and identities belong to several devices: rename or remove one")
        (owner,) = owners
        return self._update(device, known.devices[owner], known)

    def _conflict(self, device: FileDevice, name: str, known: _Known) -> str:
        for identity in _identities(device):
            if identity in known.credentials:
                return f"identity {identity!r} is taken in realm {self.realm.name!r}"
        return f"device {name!r} is there already in realm {self.realm.name!r}"

    def _check_keys(self, device: FileDevice) -> None:
        if self.realm.is_derived and any(each.key is not None for each in device.credentials):
            raise RegistryRefused(
                f"the keys of realm {self.realm.name!r} are derived ({self.realm.key_source}): the file must have none"
            )

    # New ones

    def _add(self, device: FileDevice, name: str) -> Add:
        labels = self._labelled(_or(device.labels, _NO_LABELS))
        networks = _or(device.networks, ())
        values = {
            "name": name,
            "group_name": _or(device.group, None) or self.group,
            "labels": _json(labels) if labels else "{}",
            "networks": _json(networks) if networks else "[]",
            "disabled": _or(device.disabled, False),
        }
        return Add(device, name, values, [self._new(each) for each in device.credentials])

    def _labelled(self, labels: Mapping[str, str]) -> Mapping[str, str]:
        return identities.parse_labels({**labels, **self.labels}) if self.labels else labels

    def _new(self, credential: FileCredential) -> KeyedIdentity:
        if credential.key is None and not self.realm.is_derived:
            raise RegistryRefused(
                f"identity {credential.identity!r} has no key, and realm {self.realm.name!r} derives none"
            )
        values = {
            "hash": _or(credential.hash, "sha256"),
            "not_before": _or(credential.not_before, None),
            "not_after": _or(credential.not_after, None),
            "revoked_at": _or(credential.revoked_at, None),
        }
        check_window(values["not_before"], values["not_after"])
        return KeyedIdentity(credential.identity, credential.key, values)

    # Those that are there

    def _update(self, device: FileDevice, owner: Any, known: _Known) -> Update | Same:
        if device.name is not None and device.name != owner.name:
            raise RegistryRefused(f"its identity belongs to device {owner.name!r}, not to {device.name!r}")
        update = Update(device, owner.name, owner.id, self._changed(device, owner))
        update.changes.update(_SHOWN[column] for column in update.values)
        for credential in device.credentials:
            row = known.credentials.get(credential.identity)
            if row is None:
                update.added.append(self._new(credential))
                update.changes.add("identity")
            else:
                self._update_credential(update, credential, row)
        return update if update.changes else Same(device, owner.name)

    def _changed(self, device: FileDevice, owner: Any) -> dict[str, Any]:
        """Column -> value, of what differs."""
        labels: Mapping[str, str] = msgspec.json.decode(owner.labels, type=dict[str, str])
        group = _or(device.group, owner.group_name)
        values = {
            "group_name": group or self.group,
            "labels": _json(self._labelled(_or(device.labels, labels))),
            "networks": owner.networks if device.networks is UNCHANGED else _json(device.networks),
            "disabled": _or(device.disabled, owner.disabled),
        }
        return {column: value for column, value in values.items() if value != getattr(owner, column)}

    def _update_credential(self, update: Update, credential: FileCredential, row: Any) -> None:
        wanted = {
            "hash": _or(credential.hash, row.hash),
            "not_before": _or(credential.not_before, row.not_before),
            "not_after": _or(credential.not_after, row.not_after),
            "revoked_at": _revocation(credential.revoked_at, row.revoked_at),
        }
        check_window(wanted["not_before"], wanted["not_after"])
        changed = {column for column, value in wanted.items() if value != getattr(row, column)}
        if changed:
            update.credentials.append({"credential_id": row.id, **wanted})
            update.changes.update(_SHOWN.get(column, column) for column in changed)
        if credential.key is not None and self.vault.fingerprint(credential.key) != bytes(row.fingerprint):
            update.keys.append((row.id, credential.identity, credential.key))
            update.changes.add("key")


_NO_LABELS: Mapping[str, str] = {}

_SHOWN = {
    "group_name": "group",
    "labels": "labels",
    "networks": "allow_from",
    "disabled": "enabled",
}


def _revocation(said: dt.datetime | Unchanged | None, before: dt.datetime | None) -> dt.datetime | None:
    """A credential that is revoked stays so since when it was."""
    return before if said is UNCHANGED or (said is not None and before is not None) else said


def _name(device: FileDevice) -> str:
    return device.credentials[0].identity if device.name is None else device.name


def _identities(device: FileDevice) -> list[str]:
    return [credential.identity for credential in device.credentials]


def _or(value: Any, default: Any) -> Any:
    return default if value is UNCHANGED else value


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
