"""The audit: who changed what, chained so that no row can be changed, taken out or cut off unseen.

Rows are only ever added. Each has a link: an HMAC-SHA256, under a secret that is sealed in the registry, of the link
before it and of everything in the row, the sequence of the row before included. Whoever can write the database but does
not have the master key can make no link.

The newest link, the head, stands in the row of `feed` too, so that a table cut off at its end is found. Somebody who puts
an older head there as well is found by a head that was kept elsewhere: the follower logs it every hour, and
`gatewayctl audit-log --verify --head` takes it.
"""

import datetime as dt
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
from sqlalchemy import Connection, select, update

from gateway.errors import RegistryRefused
from gateway.registry import schema

__all__ = [
    "AuditFilter",
    "AuditReport",
    "AuditRow",
    "Head",
    "audit_rows",
    "chain_rows",
    "head",
    "link",
    "verify",
]

_PAGE_ROWS = 1_000
_FAULTS_MAX = 20
_LINK_BYTES = 32


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One change as the audit has it. `detail` is a JSON object, never with a key."""

    sequence: int
    previous: int | None
    """The sequence of the row before, 0 for the first; None: written by a program that knew no chain."""
    at: dt.datetime
    actor: str
    source: str
    action: str
    subject: str
    detail: str

    def columns(self) -> dict[str, Any]:
        """As the table has it, without the link."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def details(self) -> dict[str, Any]:
        return msgspec.json.decode(self.detail, type=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Head:
    """The newest row and its link: what the whole audit can be held against later. Written `SEQUENCE-LINK`."""

    sequence: int
    chain: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises RegistryRefused."""
        sequence, _, chain = text.strip().partition("-")
        try:
            parsed = cls(int(sequence), bytes.fromhex(chain))
        except ValueError:
            parsed = cls(0, b"")
        if parsed.sequence < 1 or len(parsed.chain) != _LINK_BYTES:
            raise RegistryRefused(
                f"{text[:100]!a} is no head of the audit: give one as it stands in the log line audit_head"
            )
        return parsed

    def __str__(self) -> str:
        return f"{self.sequence}-{self.chain.hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which rows: those that match everything given here. `subject` also matches everything below a realm."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a check of the whole audit found; without `faults` it is as it was written."""

    rows: int
    head: Head | None
    faults: list[str] = field(default_factory=list)


def link(secret: bytes, before: bytes, row: AuditRow) -> bytes:
    """The link of a row whose predecessor has the link `before` (empty for the first row)."""
    at = row.at.astimezone(dt.UTC).isoformat(timespec="microseconds")
    said = [row.sequence, row.previous, at, row.actor, row.source, row.action, row.subject, row.detail]
    return hmac.digest(secret, before + msgspec.msgpack.encode(said), "sha256")


def head(connection: Connection) -> Head | None:
    """The newest row that was chained; None in a registry that has none."""
    feed = schema.feed.c
    row = connection.execute(select(feed.audit_sequence, feed.audit_chain)).first()
    return (
        None if row is None or row.audit_chain is None else Head(row.audit_sequence, bytes(row.audit_chain))
    )


def audit_rows(
    connection: Connection, wanted: AuditFilter, *, after: int = 0, newest: int | None = None
) -> Iterator[AuditRow]:
    """Rows that match, oldest first, read page by page.

    Args:
        connection: to the registry.
        wanted: which rows.
        after: only rows of a later sequence.
        newest: only the last so many of them.

    """
    audit = schema.audit.c
    where = [*_conditions(wanted)]
    if newest is not None:
        found = connection.scalars(
            select(audit.sequence)
            .where(audit.sequence > after, *where)
            .order_by(audit.sequence.desc())
            .limit(newest)
        ).all()
        after = min(found, default=after + 1) - 1
    while True:
        rows = connection.execute(
            select(*(audit[name] for name in AuditRow.__slots__))
            .where(audit.sequence > after, *where)
            .order_by(audit.sequence)
            .limit(_PAGE_ROWS)
        ).all()
        if not rows:
            return
        for row in rows:
            yield AuditRow(*row)
        after = rows[-1].sequence


def _conditions(wanted: AuditFilter) -> Iterator[Any]:
    audit = schema.audit.c
    if wanted.actor is not None:
        yield audit.actor == wanted.actor
    if wanted.action is not None:
        yield audit.action == wanted.action
    if wanted.subject is not None:
        below = wanted.subject + "/"
        # by its first characters: LIKE would take % and _ for more than they are
        yield (audit.subject == wanted.subject) | (
            schema.audit.c.subject.between(below, below + "\U0010ffff")
        )
    if wanted.since is not None:
        yield audit.at >= wanted.since
    if wanted.until is not None:
        yield audit.at < wanted.until


def verify(connection: Connection, secret: bytes, held: Head | None = None) -> AuditReport:
    """Go through every row and every link.

    Args:
        connection: to the registry, in one transaction.
        secret: the audit secret.
        held: a head that was kept elsewhere, to find an audit that was cut off and given an older head.

    """
    faults: list[str] = []
    chain, last, rows = b"", 0, 0
    held_found = held is None
    for row, stored in _linked_rows(connection):
        rows += 1
        if stored is None or row.previous is None:
            faults.append(
                f"row {row.sequence} has no link: a program of before the chain wrote it, or it was added"
            )
            continue
        if row.previous != last:
            faults.append(_gap(row, last))
        elif not hmac.compare_digest(link(secret, chain, row), stored):
            faults.append(f"row {row.sequence} was changed, or the one before it was")
        if held is not None and row.sequence == held.sequence:
            held_found = True
            if not hmac.compare_digest(stored, held.chain):
                faults.append(f"row {row.sequence} is not the one that the head was taken of")
        chain, last = stored, row.sequence
    newest = head(connection)
    if newest is not None and newest.sequence > last:
        faults.append(f"cut off: the rows after {last}, up to {newest.sequence}, are missing")
    elif newest is not None and (newest.sequence, newest.chain) != (last, chain):
        faults.append(
            f"the head is of row {newest.sequence}, and the last row is {last}: one of them was changed"
        )
    if not held_found and held is not None:
        faults.append(f"cut off: row {held.sequence}, which the head was taken of, is missing")
    if len(faults) > _FAULTS_MAX:
        faults = [*faults[:_FAULTS_MAX], f"and {len(faults) - _FAULTS_MAX} more"]
    return AuditReport(rows, newest, faults)


def _gap(row: AuditRow, last: int) -> str:
    if row.previous is not None and row.previous > last:
        return f"missing: the rows after {last}, up to {row.previous}"
    return f"row {row.sequence} does not follow row {last}: rows were added or changed before it"


def _linked_rows(connection: Connection) -> Iterator[tuple[AuditRow, bytes | None]]:
    audit = schema.audit.c
    after = 0
    columns: list[Any] = [audit[name] for name in AuditRow.__slots__]
    while True:
        rows = connection.execute(
            select(*columns, audit.chain)
            .where(audit.sequence > after)
            .order_by(audit.sequence)
            .limit(_PAGE_ROWS)
        ).all()
        if not rows:
            return
        for *values, chain in rows:
            yield AuditRow(*values), None if chain is None else bytes(chain)
        after = rows[-1].sequence


def chain_rows(connection: Connection, secret: bytes) -> int:
    """Chain what was written before there was a chain; how many rows. Does nothing once there is one."""
    feed, audit = schema.feed, schema.audit
    if connection.execute(select(feed.c.audit_chain)).scalar() is not None:
        return 0
    chain, last, rows = b"", 0, 0
    for row, _ in _linked_rows(connection):
        values = row.columns() | {"previous": last}
        chain = link(secret, chain, AuditRow(**values))
        connection.execute(
            update(audit).where(audit.c.sequence == row.sequence).values(previous=last, chain=chain)
        )
        last, rows = row.sequence, rows + 1
    if rows:
        connection.execute(update(feed).values(audit_sequence=last, audit_chain=chain))
    return rows
