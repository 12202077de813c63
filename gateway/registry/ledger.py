"""The end of every write: a sequence from the feed's one row, then what changed and who did it.

`feed` says why this order is the one that no reader can miss a change in.
"""

import datetime as dt
import getpass
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import msgspec
from sqlalchemy import Connection, delete, insert, select, update

from gateway.registry import schema

__all__ = ["Author", "Entry", "record_change", "record_unaudited", "utc_now"]

_CHANGES_KEPT = 100_000
"""How far a follower may be behind before it copies everything anew; a row of `changes` takes about 50 bytes."""
_PRUNE_EVERY = 1_000
_ACTOR_CHARACTERS_MAX = 128
_SOURCE_CHARACTERS_MAX = 255


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One change: the range of ids that readers have to read again, and what the audit says of it (never a key)."""

    scope: Literal["device", "realm"]
    first_id: int
    last_id: int
    action: str
    subject: str
    detail: Mapping[str, Any] = field(default_factory=dict)


def record_change(
    connection: Connection, entry: Entry, author: Author, now: Callable[[], dt.datetime]
) -> int:
    """Take the next sequence, write `changes` and `audit` under it, and give it. Commit soon: others wait for it."""
    at = now()
    sequence = record_unaudited(connection, entry.scope, entry.first_id, entry.last_id, at)
    connection.execute(
        insert(schema.audit).values(
            sequence=sequence,
            at=at,
            actor=author.actor[:_ACTOR_CHARACTERS_MAX],
            source=author.source[:_SOURCE_CHARACTERS_MAX],
            action=entry.action,
            subject=entry.subject,
            detail=msgspec.json.encode(entry.detail).decode(),
        )
    )
    return sequence


def record_unaudited(
    connection: Connection, scope: Literal["device", "realm"], first_id: int, last_id: int, at: dt.datetime
) -> int:
    """The same for what a running gateway writes by itself: nobody is to account for it."""
    sequence = _next_sequence(connection)
    connection.execute(
        insert(schema.changes).values(
            sequence=sequence, scope=scope, first_id=first_id, last_id=last_id, at=at
        )
    )
    if sequence % _PRUNE_EVERY == 0:
        _prune(connection, sequence - _CHANGES_KEPT)
    return sequence


def _next_sequence(connection: Connection) -> int:
    feed = schema.feed.c
    connection.execute(update(schema.feed).values(sequence=feed.sequence + 1))
    return int(connection.execute(select(feed.sequence)).scalar_one())


def _prune(connection: Connection, through: int) -> None:
    if through > 0:
        connection.execute(delete(schema.changes).where(schema.changes.c.sequence <= through))
        connection.execute(update(schema.feed).values(pruned_through=through))
