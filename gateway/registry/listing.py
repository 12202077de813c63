"""The registry as an operator reads it: realms, devices and their credentials, never a key."""

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, func, select

from gateway.registry import schema
from gateway.registry.records import PskHash

__all__ = ["Credential", "Device", "DeviceFilter", "Realm", "device_named", "devices_page", "realms_by_name"]


@dataclass(frozen=True, slots=True)
class Realm:
    """A tenant with its TLS-PSK identity hint (None: no hint is sent)."""

    id: int
    name: str
    hint: str | None
    created_at: dt.datetime
    record_bytes_max: int | None = None
    """Most plaintext bytes of a TLS record to its devices (None: what TLS allows)."""


@dataclass(frozen=True, slots=True)
class Credential:
    """One identity of a device. Its window is [not_before, not_after), None: open at that end."""

    identity: str
    hash: PskHash
    not_before: dt.datetime | None
    not_after: dt.datetime | None
    revoked_at: dt.datetime | None
    created_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Device:
    """A device; `id` is also the place from which a listing goes on."""

    id: int
    realm: str
    name: str
    group: str | None
    labels: dict[str, str]
    networks: tuple[str, ...]
    """Where it may connect from, as CIDR texts; empty: from anywhere."""
    disabled: bool
    created_at: dt.datetime
    credentials: tuple[Credential, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFilter:
    """Which devices to list: those that match everything given here."""

    realm: str | None = None
    group: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def realms_by_name(connection: Connection) -> list[Realm]:
    table = schema.realms.c
    rows = connection.execute(
        select(table.id, table.name, table.hint, table.created_at, table.record_bytes_max).order_by(
            table.name
        )
    )
    return [Realm(*row) for row in rows]


def devices_page(connection: Connection, wanted: DeviceFilter, *, limit: int, after: int) -> list[Device]:
    """At most `limit` devices in the order they were added, those with an id above `after`."""
    query = _device_rows().where(schema.devices.c.id > after).order_by(schema.devices.c.id).limit(limit)
    if wanted.realm is not None:
        query = query.where(schema.realms.c.name == wanted.realm)
    if wanted.group is not None:
        query = query.where(schema.devices.c.group_name == wanted.group)
    for key, value in wanted.labels.items():
        query = query.where(_has_label(connection, key, value))
    return _with_credentials(connection, connection.execute(query).all())


def device_named(connection: Connection, realm: str, name: str) -> Device | None:
    query = _device_rows().where(schema.realms.c.name == realm, schema.devices.c.name == name)
    devices = _with_credentials(connection, connection.execute(query).all())
    return devices[0] if devices else None


def _device_rows() -> Select[Any]:
    devices, realms = schema.devices.c, schema.realms.c
    return select(
        devices.id,
        realms.name,
        devices.name,
        devices.group_name,
        devices.labels,
        devices.networks,
        devices.disabled,
        devices.created_at,
    ).join_from(schema.devices, schema.realms, devices.realm_id == realms.id)


def _has_label(connection: Connection, key: str, value: str) -> ColumnElement[bool]:
    """By the text that is stored: no key has a quote, and those in values are escaped, so this finds the pair alone."""
    pair = f"{msgspec.json.encode(key).decode()}:{msgspec.json.encode(value).decode()}"
    position = func.strpos if connection.dialect.name == "postgresql" else func.instr
    return position(schema.devices.c.labels, pair) > 0


def _with_credentials(connection: Connection, rows: Sequence[Sequence[Any]]) -> list[Device]:
    credentials = _credentials(connection, [row[0] for row in rows])
    return [
        Device(
            id=id_,
            realm=realm,
            name=name,
            group=group,
            labels=msgspec.json.decode(labels, type=dict[str, str]),
            networks=msgspec.json.decode(networks, type=tuple[str, ...]),
            disabled=disabled,
            created_at=created_at,
            credentials=tuple(credentials[id_]),
        )
        for id_, realm, name, group, labels, networks, disabled, created_at in rows
    ]


def _credentials(connection: Connection, device_ids: list[int]) -> dict[int, list[Credential]]:
    table = schema.credentials.c
    query = (
        select(
            table.device_id,
            table.identity,
            table.hash,
            table.not_before,
            table.not_after,
            table.revoked_at,
            table.created_at,
        )
        .where(table.device_id.in_(device_ids))
        .order_by(table.id)
    )
    found: dict[int, list[Credential]] = defaultdict(list)
    for device_id, *values in connection.execute(query):
        found[device_id].append(Credential(*values))
    return found
