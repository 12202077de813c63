"""The registry as an operator reads it: realms, devices and their credentials, never a key."""

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, exists, false, func, select

from gateway.registry import identities, schema
from gateway.registry.records import PskHash

__all__ = [
    "Credential",
    "Device",
    "DeviceFilter",
    "Realm",
    "device_named",
    "devices_page",
    "realm_named",
    "realms_by_name",
]


@dataclass(frozen=True, slots=True)
class Realm:
    """A tenant with its TLS-PSK identity hint (None: no hint is sent)."""

    id: int
    name: str
    hint: str | None
    created_at: dt.datetime
    record_bytes_max: int | None = None
    """Most plaintext bytes of a TLS record to its devices (None: what TLS allows)."""
    key_source: str = "stored"
    enroll: str = "registered"
    idle_days: int | None = None
    sessions_per_device: int | None = None
    devices: int | None = None
    """How many it has, where they were counted."""


@dataclass(frozen=True, slots=True)
class Credential:
    """One identity of a device. Its window is [not_before, not_after), None: open at that end."""

    identity: str
    hash: PskHash
    not_before: dt.datetime | None
    not_after: dt.datetime | None
    revoked_at: dt.datetime | None
    created_at: dt.datetime
    last_used_at: dt.datetime | None = None
    """The first use on the last day of service on which it was used."""
    is_idle: bool = False
    """Whether it is refused because it was not used for longer than its realm allows."""


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

    expiring: tuple[dt.datetime, dt.datetime] | None = None
    """A credential that is good at the first of these times ends by the second."""
    unused_since: dt.datetime | None = None
    """No credential was used, or added, since then."""

    def checked(self) -> Self:
        """The same, when group and labels could be some. Raises RegistryRefused."""
        return replace(
            self,
            group=None if self.group is None else identities.parse_group(self.group),
            labels=identities.parse_labels(self.labels),
        )


def realms_by_name(connection: Connection) -> list[Realm]:
    return [Realm(*row) for row in connection.execute(_realm_rows().order_by(schema.realms.c.name))]


def realm_named(connection: Connection, name: str) -> Realm:
    """A realm that is there, with its devices counted."""
    row = connection.execute(_realm_rows().where(schema.realms.c.name == name)).one()
    count = select(func.count()).where(schema.devices.c.realm_id == row.id)
    return replace(Realm(*row), devices=connection.execute(count).scalar_one())


def _realm_rows() -> Select[Any]:
    table = schema.realms.c
    return select(
        table.id,
        table.name,
        table.hint,
        table.created_at,
        table.record_bytes_max,
        table.key_source,
        table.enroll,
        table.idle_days,
        table.sessions_per_device,
    )


def devices_page(connection: Connection, wanted: DeviceFilter, *, limit: int, after: int) -> list[Device]:
    """At most `limit` devices in the order they were added, those with an id above `after`."""
    query = _device_rows().where(schema.devices.c.id > after).order_by(schema.devices.c.id).limit(limit)
    if wanted.realm is not None:
        query = query.where(schema.realms.c.name == wanted.realm)
    if wanted.group is not None:
        query = query.where(schema.devices.c.group_name == wanted.group)
    if wanted.expiring is not None:
        query = query.where(_expires_within(*wanted.expiring))
    if wanted.unused_since is not None:
        query = query.where(_is_unused_since(wanted.unused_since))
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


def _expires_within(now: dt.datetime, until: dt.datetime) -> ColumnElement[bool]:
    credentials = schema.credentials.c
    return exists().where(
        credentials.device_id == schema.devices.c.id,
        credentials.revoked_at.is_(None),
        credentials.not_after > now,
        credentials.not_after <= until,
    )


def _is_unused_since(moment: dt.datetime) -> ColumnElement[bool]:
    credentials = schema.credentials.c
    return ~exists().where(
        credentials.device_id == schema.devices.c.id,
        func.coalesce(credentials.last_used_at, credentials.created_at) >= moment,
    )


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
    service_day = select(schema.feed.c.service_day).scalar_subquery()
    query = (
        select(
            table.device_id,
            table.identity,
            table.hash,
            table.not_before,
            table.not_after,
            table.revoked_at,
            table.created_at,
            table.last_used_at,
            func.coalesce(service_day - table.used_on > schema.realms.c.idle_days, false()),
        )
        .join_from(schema.credentials, schema.realms, table.realm_id == schema.realms.c.id)
        .where(table.device_id.in_(device_ids))
        .order_by(table.id)
    )
    found: dict[int, list[Credential]] = defaultdict(list)
    for device_id, *values, is_idle in connection.execute(query):
        found[device_id].append(replace(Credential(*values), is_idle=bool(is_idle)))
    return found
