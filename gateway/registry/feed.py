"""The change feed: what a follower reads of the registry.

Every write to the registry ends with `UPDATE feed SET sequence = sequence + 1` on its one row, which the writer holds
to its commit; that number is the sequence of the write's row in `changes`. So commits come in the order of their
sequences, none is missing, and a reader of `sequence > last` can skip nothing (an ordinary autoincrement is given
before the commit: a transaction that commits late would be passed over).

A change names a range of ids to be read again, never what is in them: reading newer rows than the change meant is
harmless, and applying a change twice is too. A change of scope device whose range is that of no device (0 to 0) says that
credentials were used: their rows carry its sequence.
"""

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Row, ScalarSelect, Select, case, exists, func, or_, select

from gateway.errors import RegistryMismatch
from gateway.registry import schema
from gateway.registry.records import CredentialRecord, RealmRecord, identity_key
from gateway.registry.usage import USES_PER_CHANGE

__all__ = [
    "CREDENTIAL_STATES",
    "Change",
    "Credentials",
    "Head",
    "changes_after",
    "credential_count",
    "credential_pages",
    "credential_states",
    "credentials_of_devices",
    "credentials_used",
    "devices_expiring",
    "head",
    "realms",
    "secrets",
]

_PAGE_ROWS = 5_000
_RANGES_PER_STATEMENT = 100

CREDENTIAL_STATES = ("active", "revoked", "disabled", "expired", "not_yet_valid", "idle")
"""The label `state` of `pskgw_credentials`."""

Credentials = dict[bytes, CredentialRecord]
"""Records by `records.identity_key`."""

_decode_labels = msgspec.json.Decoder(dict[str, str]).decode
_decode_networks = msgspec.json.Decoder(tuple[str, ...]).decode


class Head(NamedTuple):
    """Which registry it is, its newest sequence, and the last one that `changes` no longer holds."""

    registry_id: str
    sequence: int
    pruned_through: int


class Change(NamedTuple):
    """One write: the ids of devices or realms to be read again, both ends included, committed at `at` (Unix s)."""

    sequence: int
    scope: str
    first_id: int
    last_id: int
    at: float

    @property
    def is_use(self) -> bool:
        """Whether it says no more than that credentials were used."""
        return self.scope == "device" and self.last_id == 0

    @property
    def width(self) -> int:
        """How many devices have to be read again, at most."""
        if self.is_use:
            return USES_PER_CHANGE
        return self.last_id - self.first_id + 1 if self.scope == "device" else 0


def head(connection: Connection) -> Head:
    """The state of the feed, by one small row.

    Raises:
        RegistryMismatch: the tables are there, but the registry was never initialised, or was migrated meanwhile to
            a schema that this program must not use.

    """
    feed = schema.feed.c
    row = connection.execute(
        select(feed.registry_id, feed.sequence, feed.pruned_through, feed.compatible_from)
    ).first()
    if row is None:
        raise RegistryMismatch("the registry is empty: run `gatewayctl migrate`")
    *state, compatible_from = row
    if compatible_from > schema.SCHEMA_REVISION:
        raise RegistryMismatch(
            f"the registry was migrated for programs that know schema {compatible_from}, "
            f"and this one knows {schema.SCHEMA_REVISION}: upgrade this program"
        )
    return Head(*state)


def changes_after(connection: Connection, sequence: int, limit: int) -> list[Change]:
    """The changes after `sequence`, in order, at most `limit`."""
    changes = schema.changes.c
    rows = connection.execute(
        select(changes.sequence, changes.scope, changes.first_id, changes.last_id, changes.at)
        .where(changes.sequence > sequence)
        .order_by(changes.sequence)
        .limit(limit)
    )
    return [Change(row.sequence, row.scope, row.first_id, row.last_id, row.at.timestamp()) for row in rows]


def credentials_of_devices(connection: Connection, ranges: Sequence[tuple[int, int]]) -> Credentials:
    """All credentials of the devices in these ranges, both ends included."""
    device_id = schema.devices.c.id
    found: Credentials = {}
    for start in range(0, len(ranges), _RANGES_PER_STATEMENT):
        some = ranges[start : start + _RANGES_PER_STATEMENT]
        wanted = or_(*(device_id.between(first_id, last_id) for first_id, last_id in some))
        found.update(_tombstones(connection, some))
        found.update(_identified(row) for row in connection.execute(_credential_rows().where(wanted)))
    return found


def credentials_used(connection: Connection, after: int, through: int) -> Credentials:
    """The credentials whose last use was written by the changes after `after`, up to `through`."""
    used = schema.credentials.c.used_sequence
    rows = connection.execute(_credential_rows().where(used > after, used <= through))
    return dict(_identified(row) for row in rows)


def credential_pages(connection: Connection) -> Iterator[Credentials]:
    """Every credential, page by page, by primary key.

    Each page is a statement of its own. Rows that others write meanwhile may be in it or not: read `head` before, and
    the changes after it afterwards.
    """
    credentials = schema.credentials.c
    yield from _tombstone_pages(connection)
    last_id = 0
    while True:
        rows = connection.execute(
            _credential_rows().where(credentials.id > last_id).order_by(credentials.id).limit(_PAGE_ROWS)
        ).all()
        if not rows:
            return
        last_id = rows[-1].id
        yield dict(_identified(row) for row in rows)


def credential_count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(schema.credentials)).scalar_one()


def credential_states(connection: Connection, now: float) -> dict[str, int]:
    """How many credentials are `active`, `revoked`, `disabled`, `expired`, `not_yet_valid` or `idle` at `now` (Unix s)."""
    credentials, devices, realms_ = schema.credentials, schema.devices, schema.realms
    moment = dt.datetime.fromtimestamp(now, dt.UTC)
    state = case(
        (credentials.c.revoked_at.is_not(None), "revoked"),
        (devices.c.disabled, "disabled"),
        (credentials.c.not_after <= moment, "expired"),
        (credentials.c.not_before > moment, "not_yet_valid"),
        (_service_day() - credentials.c.used_on > realms_.c.idle_days, "idle"),
        else_="active",
    ).label("state")
    counted = (
        select(state, func.count())
        .join_from(credentials, devices, credentials.c.device_id == devices.c.id)
        .join(realms_, credentials.c.realm_id == realms_.c.id)
        .group_by(state)
    )
    found = dict.fromkeys(CREDENTIAL_STATES, 0)
    found.update((name, number) for name, number in connection.execute(counted))
    return found


def devices_expiring(connection: Connection, now: float, within_s: float) -> int:
    """How many enabled devices will be shut out `within_s` seconds from `now` (Unix s), unless somebody acts.

    Those are the devices with a credential that is good now and ends by then, and with no other that lasts longer and
    was used already: one that was rotated counts until the device has come with its new key.
    """
    mine, other, devices = schema.credentials, schema.credentials.alias(), schema.devices
    moment = dt.datetime.fromtimestamp(now, dt.UTC)
    until = moment + dt.timedelta(seconds=within_s)
    has_moved_on = exists().where(
        other.c.device_id == mine.c.device_id,
        other.c.revoked_at.is_(None),
        or_(other.c.not_after.is_(None), other.c.not_after > until),
        other.c.last_used_at.is_not(None),
    )
    ending = (
        select(func.count(mine.c.device_id.distinct()))
        .join_from(mine, devices, mine.c.device_id == devices.c.id)
        .where(
            mine.c.revoked_at.is_(None),
            devices.c.disabled.is_(False),
            mine.c.not_after > moment,
            mine.c.not_after <= until,
            ~has_moved_on,
        )
    )
    return connection.execute(ending).scalar_one()


def realms(connection: Connection) -> list[RealmRecord]:
    """Every realm, by id."""
    table = schema.realms.c
    rows = connection.execute(
        select(
            table.id,
            table.name,
            table.hint,
            table.record_bytes_max,
            table.key_source,
            table.sealed_secret,
            table.enroll,
            table.idle_days,
            table.sessions_per_device,
            _service_day().label("service_day"),
        ).order_by(table.id)
    )
    return [
        RealmRecord(
            id=row.id,
            name=row.name,
            hint=row.hint,
            record_bytes_max=row.record_bytes_max,
            key_source=row.key_source,
            sealed_secret=b"" if row.sealed_secret is None else bytes(row.sealed_secret),
            enrolls=row.enroll == "first-use",
            idle_days=row.idle_days,
            sessions_per_device=row.sessions_per_device,
            service_day=row.service_day,
        )
        for row in rows
    ]


def _service_day() -> ScalarSelect[int]:
    return select(schema.feed.c.service_day).scalar_subquery()


def secrets(connection: Connection) -> dict[str, bytes]:
    """The registry's own secrets by name, sealed."""
    return {row.name: bytes(row.sealed) for row in connection.execute(select(schema.secrets))}


def _credential_rows() -> Select[Any]:
    credentials, devices = schema.credentials, schema.devices
    return select(
        credentials.c.id,
        credentials.c.device_id,
        credentials.c.realm_id,
        credentials.c.identity,
        devices.c.name,
        devices.c.group_name,
        devices.c.labels,
        devices.c.disabled,
        credentials.c.revoked_at,
        credentials.c.not_before,
        credentials.c.not_after,
        devices.c.networks,
        credentials.c.hash,
        credentials.c.sealed_key,
        credentials.c.used_on,
    ).join_from(credentials, devices, credentials.c.device_id == devices.c.id)


def _identified(row: Sequence[Any]) -> tuple[bytes, CredentialRecord]:
    (
        credential_id,
        device_id,
        realm_id,
        identity,
        device,
        group,
        labels,
        disabled,
        revoked_at,
        not_before,
        not_after,
        networks,
        hash_,
        sealed_key,
        used_on,
    ) = row
    record = CredentialRecord(
        credential_id,
        device_id,
        realm_id,
        device,
        group,
        _decode_labels(labels) if labels != "{}" else {},
        disabled,
        revoked_at is not None,
        _unix(not_before),
        _unix(not_after),
        _decode_networks(networks) if networks != "[]" else (),
        hash_,
        bytes(sealed_key),
        used_on,
    )
    return identity_key(realm_id, identity.encode()), record


def _tombstones(connection: Connection, ranges: Sequence[tuple[int, int]]) -> Credentials:
    """What is left of removed devices whose keys are derived: records that refuse their identities."""
    device_id = schema.tombstones.c.device_id
    wanted = or_(*(device_id.between(first_id, last_id) for first_id, last_id in ranges))
    return dict(_buried(row) for row in connection.execute(select(schema.tombstones).where(wanted)))


def _tombstone_pages(connection: Connection) -> Iterator[Credentials]:
    table = schema.tombstones
    last_id = 0
    while rows := connection.execute(
        select(table).where(table.c.id > last_id).order_by(table.c.id).limit(_PAGE_ROWS)
    ).all():
        last_id = rows[-1].id
        yield dict(_buried(row) for row in rows)


def _buried(row: Row[Any]) -> tuple[bytes, CredentialRecord]:
    record = CredentialRecord(
        credential_id=0,
        device_id=row.device_id,
        realm_id=row.realm_id,
        device=row.identity,
        group=None,
        labels={},
        disabled=False,
        revoked=True,
        not_before=None,
        not_after=None,
        networks=(),
        hash="sha256",
        sealed_key=b"",
    )
    return identity_key(row.realm_id, row.identity.encode()), record


def _unix(moment: dt.datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()
