"""The end of every write: a sequence from the feed's one row, then what changed and who did it.

`feed` says why this order is the one that no reader can miss a change in, and `audit` how its rows are chained.
"""

import datetime as dt
import getpass
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import msgspec
from sqlalchemy import Connection, delete, insert, select, update

from gateway.registry import schema
from gateway.registry.audit import AuditRow, link
from gateway.registry.database import CHANNEL

__all__ = ["Author", "Entry", "Ledger", "note_change", "utc_now"]

_CHANGES_KEPT = 100_000
"""How far a follower may be behind before it copies everything anew; a row of `changes` takes about 50 bytes."""
_PRUNE_EVERY = 1_000
_ACTOR_CHARACTERS_MAX = 128
_SOURCE_CHARACTERS_MAX = 255

Scope = Literal["device", "realm"]


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes, and from where, for the audit: the user of the operating system and the host by default."""

    actor: str
    source: str

    @classmethod
    def of_process(cls) -> Self:
        try:
            actor = getpass.getuser()
        except (
            KeyError,
            OSError,
        ):  # a user id without a name, as in many containers; KeyError before Python 3.13
            actor = "unknown"
        return cls(actor, socket.gethostname())

    @classmethod
    def of_gateway(cls) -> Self:
        """What a running gateway writes by itself, such as an enrolment."""
        return cls("gateway", socket.gethostname())


@dataclass(frozen=True, slots=True)
class Entry:
    """One change: the range of ids that readers have to read again, and what the audit says of it (never a key)."""

    scope: Scope
    first_id: int
    last_id: int
    action: str
    subject: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Who writes, when, and the secret under which the audit is chained."""

    author: Author
    now: Callable[[], dt.datetime]
    audit_secret: bytes = field(repr=False)

    def record(self, connection: Connection, entry: Entry, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Take the next sequence, write `changes` and `audit` under it, and give it. Commit soon: others wait for it.

        `ranges` are further ids that the entry is about; each is a change of its own, before it.
        """
        at = self.now()
        if ranges:
            _note_changes(connection, entry.scope, ranges, at)
        sequence = note_change(connection, entry.scope, entry.first_id, entry.last_id, at)
        feed = schema.feed.c
        previous, chain = connection.execute(select(feed.audit_sequence, feed.audit_chain)).one()
        row = AuditRow(
            sequence=sequence,
            previous=previous,
            at=at,
            actor=self.author.actor[:_ACTOR_CHARACTERS_MAX],
            source=self.author.source[:_SOURCE_CHARACTERS_MAX],
            action=entry.action,
            subject=entry.subject,
            detail=msgspec.json.encode(entry.detail).decode(),
        )
        chain = link(self.audit_secret, b"" if chain is None else bytes(chain), row)
        connection.execute(insert(schema.audit).values(**row.columns(), chain=chain))
        connection.execute(update(schema.feed).values(audit_sequence=sequence, audit_chain=chain))
        return sequence


def note_change(connection: Connection, scope: Scope, first_id: int, last_id: int, at: dt.datetime) -> int:
    """Take the next sequence and write `changes` under it: a change that the audit need not know."""
    sequence = _next_sequence(connection)
    connection.execute(
        insert(schema.changes).values(
            sequence=sequence, scope=scope, first_id=first_id, last_id=last_id, at=at
        )
    )
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"NOTIFY {CHANNEL}")  # heard with the commit, see `listener`
    if sequence % _PRUNE_EVERY == 0:
        _prune(connection, sequence - _CHANGES_KEPT)
    return sequence


def _note_changes(
    connection: Connection, scope: Scope, ranges: Sequence[tuple[int, int]], at: dt.datetime
) -> None:
    """As many changes as there are ranges, by one statement per table."""
    last = _next_sequence(connection, len(ranges))
    connection.execute(
        insert(schema.changes),
        [
            {"sequence": sequence, "scope": scope, "first_id": first_id, "last_id": last_id, "at": at}
            for sequence, (first_id, last_id) in enumerate(ranges, start=last - len(ranges) + 1)
        ],
    )
    if last // _PRUNE_EVERY > (last - len(ranges)) // _PRUNE_EVERY:
        _prune(connection, last - _CHANGES_KEPT)


def _next_sequence(connection: Connection, count: int = 1) -> int:
    """The last of so many sequences that are taken."""
    feed = schema.feed.c
    connection.execute(update(schema.feed).values(sequence=feed.sequence + count))
    return int(connection.execute(select(feed.sequence)).scalar_one())


def _prune(connection: Connection, through: int) -> None:
    if through > 0:
        connection.execute(delete(schema.changes).where(schema.changes.c.sequence <= through))
        connection.execute(update(schema.feed).values(pruned_through=through))
