"""How far unfinished imports came: a row for each, written in the transactions of its chunks and gone with the last.

An import is known by the digest of its file, its realm and its options, so the same command finds it again, whatever
the file is called by then.
"""

import datetime as dt
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update

from gateway.errors import RegistryRefused
from gateway.registry import schema

__all__ = ["ImportJob", "Place", "forget", "place_of", "save_place"]


class ImportJob(NamedTuple):
    """What makes it the same import; digests as hex."""

    digest: str
    realm_id: int
    options: str


class Place(NamedTuple):
    """What is in the registry of the file: so many devices, up to this line."""

    devices: int = 0
    last_line: int = 0


def place_of(connection: Connection, job: ImportJob, *, lock: bool = False) -> Place:
    """Where to go on; the very beginning for an import that was not begun, or was finished."""
    table = schema.imports
    query = select(table.c.devices, table.c.last_line).where(_is(job))
    row = connection.execute(query.with_for_update() if lock else query).first()
    return Place() if row is None else Place(*row)


def save_place(connection: Connection, job: ImportJob, before: Place, now_at: Place, at: dt.datetime) -> None:
    """Go on from `before`, in the transaction that writes what lies between.

    Raises RegistryRefused: somebody else has gone on from there.
    """
    _check(connection, job, before)
    table = schema.imports
    values = {**now_at._asdict(), "updated_at": at}
    if before == Place():
        connection.execute(insert(table).values(**job._asdict(), **values))
    else:
        connection.execute(update(table).where(_is(job)).values(**values))


def forget(connection: Connection, job: ImportJob, before: Place) -> None:
    """The import is finished: the same command begins anew. Raises as `save_place`."""
    _check(connection, job, before)
    connection.execute(delete(schema.imports).where(_is(job)))


def _check(connection: Connection, job: ImportJob, before: Place) -> None:
    if place_of(connection, job, lock=True) != before:
        raise RegistryRefused("the same import runs elsewhere: let one of them end")


def _is(job: ImportJob) -> ColumnElement[bool]:
    table = schema.imports.c
    return and_(table.digest == job.digest, table.realm_id == job.realm_id, table.options == job.options)
