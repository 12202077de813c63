"""Writing what `import_plan` decided: one chunk of an import, in a transaction of somebody else."""

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from gateway.registry import schema
from gateway.registry.credentials import credential_columns, new_key, same_key_as
from gateway.registry.import_plan import Add, KeyedIdentity, Step, Update
from gateway.registry.realms import KnownRealm
from gateway.registry.usage import first_day
from gateway.registry.vault import Vault

__all__ = ["SharedKeys", "Written", "write_steps"]

_EXAMPLES: Final = 3
_RARE: Final = ("not_before", "not_after", "revoked_at")


@dataclass(slots=True)
class SharedKeys:
    """Credentials whose key another has too, and a few of them in words."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "SharedKeys") -> None:
        self.count += other.count
        self.examples = (self.examples + other.examples)[:_EXAMPLES]


@dataclass(frozen=True, slots=True)
class Written:
    """The ids of the devices that were written, ascending, and the keys among them that are used twice."""

    device_ids: list[int]
    shared: SharedKeys


def write_steps(
    connection: Connection, vault: Vault, realm: KnownRealm, steps: Iterable[Step], at: dt.datetime
) -> Written:
    """Write devices and credentials, by a statement per table and not per row."""
    added, updated = [], []
    for step in steps:
        if isinstance(step, Add):
            added.append(step)
        elif isinstance(step, Update):
            updated.append(step)
    writer = _Writer(connection, vault, realm, at)
    ids = writer.add(added)
    writer.update(updated)
    writer.insert_credentials()
    return Written(sorted([*ids, *(step.device_id for step in updated)]), writer.shared())


class _Writer:
    def __init__(self, connection: Connection, vault: Vault, realm: KnownRealm, at: dt.datetime) -> None:
        self._connection = connection
        self._vault = vault
        self._realm = realm
        self._at = at
        self._used_on = first_day(connection)
        self._rows: list[dict[str, Any]] = []
        self._fingerprints: dict[bytes, list[str]] = {}
        """Identities by the fingerprints of keys that are new."""

    def add(self, steps: Sequence[Add]) -> list[int]:
        """Insert devices, and prepare their credentials."""
        if not steps:
            return []
        table = schema.devices
        rows = self._connection.execute(
            insert(table).returning(table.c.name, table.c.id),
            [{"realm_id": self._realm.id, "created_at": self._at, **step.values} for step in steps],
        )
        ids: dict[str, int] = {name: id_ for name, id_ in rows}  # noqa: C416 - rows are no pairs to mypy
        for step in steps:
            self._prepare(ids[step.name], step.credentials)
        return list(ids.values())

    def update(self, steps: Sequence[Update]) -> None:
        """Update devices and credentials, and prepare those that come to them."""
        columns = [step for step in steps if step.values]
        if columns:
            self._update_devices(columns)
        windows = [row for step in steps for row in step.credentials]
        if windows:
            self._update_credentials(windows)
        keys = [self._resealed(*key) for step in steps for key in step.keys]
        if keys:
            self._update_credentials(keys)
        for step in steps:
            self._prepare(step.device_id, step.added)

    def _update_devices(self, steps: Sequence[Update]) -> None:
        table = schema.devices
        for step in steps:  # few statements alike: every device may differ in other columns
            self._connection.execute(update(table).where(table.c.id == step.device_id).values(**step.values))

    def _update_credentials(self, rows: list[dict[str, Any]]) -> None:
        table = schema.credentials
        self._connection.execute(update(table).where(table.c.id == bindparam("credential_id")), rows)

    def _resealed(self, credential_id: int, identity: str, given: Any) -> dict[str, Any]:
        return {"credential_id": credential_id, **self._sealed(identity, given)}

    def _prepare(self, device_id: int, credentials: Iterable[KeyedIdentity]) -> None:
        for each in credentials:
            values = each.values
            columns = credential_columns(
                device_id, self._realm.id, each.identity, values["hash"], self._at, self._used_on
            )
            self._rows.append({**columns, **values, **self._sealed(each.identity, each.key)})

    def _sealed(self, identity: str, given: Any) -> dict[str, bytes]:
        key, sealed_key = new_key(self._vault, self._realm, identity, given)
        fingerprint = self._vault.fingerprint(key)
        self._fingerprints.setdefault(fingerprint, []).append(identity)
        return {"sealed_key": sealed_key, "fingerprint": fingerprint}

    def insert_credentials(self) -> None:
        """Insert all that were prepared; identities that were removed once are let in again."""
        if not self._rows:
            return
        tombstones = schema.tombstones
        if self._realm.is_derived:  # nobody else has any
            self._connection.execute(
                delete(tombstones).where(
                    tombstones.c.realm_id == self._realm.id,
                    tombstones.c.identity.in_([row["identity"] for row in self._rows]),
                )
            )
        for column in _RARE:  # what no row has need not be bound for each
            if all(row[column] is None for row in self._rows):
                for row in self._rows:
                    del row[column]
        self._connection.execute(insert(schema.credentials), self._rows)

    def shared(self) -> SharedKeys:
        """Which of the new keys another credential has, too."""
        found = SharedKeys()
        if not self._fingerprints:
            return found
        column = schema.credentials.c.fingerprint
        twice = self._connection.scalars(
            select(column)
            .where(column.in_(list(self._fingerprints)))
            .group_by(column)
            .having(func.count() > 1)
        ).all()
        for fingerprint in map(bytes, twice):
            found.count += len(self._fingerprints[fingerprint])
            if len(found.examples) < _EXAMPLES:
                found.examples += self._example(fingerprint)
        return found

    def _example(self, fingerprint: bytes) -> Iterator[str]:
        identity = self._fingerprints[fingerprint][0]
        for other in same_key_as(self._connection, fingerprint, self._realm.id, identity)[:1]:
            yield f"{self._realm.name}/{identity} and {other}"
