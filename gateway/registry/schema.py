"""The tables of the registry: the same on SQLite, PostgreSQL and MariaDB.

Names and identities are compared byte by byte everywhere. Ids are never used again: a change names a range of ids, and
one that came back would be read as something else. Nothing is written without the row of `feed`, see `feed`.
A change of this file needs a migration; `alembic check` in the tests says so.
"""

import datetime as dt
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = [
    "COMPATIBLE_FROM",
    "SCHEMA_REVISION",
    "audit",
    "changes",
    "commands",
    "credentials",
    "devices",
    "feed",
    "imports",
    "metadata",
    "realms",
    "secrets",
    "tombstones",
]

SCHEMA_REVISION = "0006"
"""The migration that this program knows; their names are numbers, so that older and newer can be told."""
COMPATIBLE_FROM = "0006"
"""The oldest program that may use a registry of this schema, by the migration that it knows; stored in `feed`.

A migration that only adds (tables, columns with a default) leaves it, and programs from before go on. One that takes away
or changes a meaning sets it to itself, here and in the row of `feed`.
"""

_MARIADB_BYTEWISE = "utf8mb4_nopad_bin"


class UtcDateTime(TypeDecorator[dt.datetime]):
    """A moment, aware in Python and stored as UTC without zone, to the microsecond."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[dt.datetime]:
        if dialect.name in {"mysql", "mariadb"}:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def bind_processor(self, dialect: Dialect) -> Callable[[dt.datetime | None], Any] | None:
        """Rows that are written together have one moment in common: it is looked at once. Several threads may ask."""
        process = super().bind_processor(dialect)
        if process is None:
            return None
        last: tuple[dt.datetime | None, Any] = (None, None)

        def processed(value: dt.datetime | None) -> Any:
            nonlocal last
            known = last
            if value is not known[0]:
                last = known = (value, process(value))
            return known[1]

        return processed

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        del dialect
        if value is None:
            return None
        assert value.tzinfo is not None, "a time without zone does not say when"
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        del dialect
        return None if value is None else value.replace(tzinfo=dt.UTC)


def _bytewise(characters_max: int) -> String:
    return (
        String(characters_max)
        .with_variant(String(characters_max, collation="C"), "postgresql")
        .with_variant(
            mysql.VARCHAR(characters_max, charset="utf8mb4", collation=_MARIADB_BYTEWISE), "mysql", "mariadb"
        )
    )


def _text() -> Text:
    return Text().with_variant(mysql.TEXT(charset="utf8mb4", collation=_MARIADB_BYTEWISE), "mysql", "mariadb")


_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only INTEGER keys by itself

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

realms = Table(
    "realms",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", _bytewise(64), nullable=False),
    Column("hint", _bytewise(128)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("record_bytes_max", Integer),
    Column("key_source", _bytewise(16), nullable=False, server_default="stored"),
    Column("sealed_secret", LargeBinary),  # of a realm whose keys are derived
    Column("enroll", _bytewise(16), nullable=False, server_default="registered"),
    Column("idle_days", Integer),  # none: a credential is never idle
    Column("sessions_per_device", Integer),  # none: as the node's limits have it
    UniqueConstraint("name"),
    sqlite_autoincrement=True,
)

devices = Table(
    "devices",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("realm_id", _Id, ForeignKey("realms.id"), nullable=False),
    Column("name", _bytewise(128), nullable=False),
    Column("group_name", _bytewise(64)),
    Column("labels", _text(), nullable=False),  # a JSON object of texts, keys sorted, no spaces
    Column("networks", _text(), nullable=False),  # a JSON array of CIDR texts; empty: from anywhere
    Column("disabled", Boolean, nullable=False, server_default=false()),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("realm_id", "name"),
    sqlite_autoincrement=True,
)

credentials = Table(
    "credentials",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device_id", _Id, ForeignKey("devices.id"), nullable=False),
    Column("realm_id", _Id, ForeignKey("realms.id"), nullable=False),
    Column("identity", _bytewise(128), nullable=False),
    Column("sealed_key", LargeBinary, nullable=False),  # empty: derived from the realm's secret
    Column("fingerprint", LargeBinary(16).with_variant(mysql.BINARY(16), "mysql", "mariadb"), nullable=False),
    Column("hash", _bytewise(8), nullable=False),
    Column("not_before", UtcDateTime),
    Column("not_after", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_used_at", UtcDateTime),
    Column("used_on", Integer, nullable=False, server_default="0"),  # the day of service, see `usage`
    Column("used_sequence", BigInteger, nullable=False, server_default="0"),  # of the change that said so
    UniqueConstraint("realm_id", "identity"),
    Index(None, "device_id"),
    Index(None, "fingerprint"),
    Index(None, "used_sequence"),
    CheckConstraint("hash IN ('sha256', 'sha384')", name="hash"),
    sqlite_autoincrement=True,
)

commands = Table(
    "commands",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device_id", _Id, ForeignKey("devices.id", ondelete="CASCADE"), nullable=False),
    Column("command_id", _bytewise(36), nullable=False),
    Column("payload", LargeBinary, nullable=False),  # at most 65,535 bytes: what a BLOB of MariaDB holds
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    UniqueConstraint("command_id"),
    Index(None, "device_id"),
    Index(None, "expires_at"),
    sqlite_autoincrement=True,
)
"""Commands that wait for their device to connect, in the order of their ids."""

tombstones = Table(
    "tombstones",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("device_id", BigInteger, nullable=False),  # that had the identity; its row is gone
    Column("realm_id", _Id, ForeignKey("realms.id"), nullable=False),
    Column("identity", _bytewise(128), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("realm_id", "identity"),
    Index(None, "device_id"),
    sqlite_autoincrement=True,
)

imports = Table(
    "imports",
    metadata,
    Column("digest", _bytewise(64), primary_key=True),  # of the file, SHA-256 as hex
    Column("realm_id", BigInteger, primary_key=True, autoincrement=False),
    Column("options", _bytewise(64), primary_key=True),  # their digest
    Column("devices", BigInteger, nullable=False),
    Column("last_line", BigInteger, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)
"""How far imports came that are not finished, see `imports`."""

feed = Table(
    "feed",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False),
    Column("registry_id", _bytewise(36), nullable=False),
    Column("pruned_through", BigInteger, nullable=False),
    Column(
        "service_day", Integer, nullable=False, server_default="0"
    ),  # how many days were served, see `usage`
    Column(
        "service_date", _bytewise(10), nullable=False, server_default=""
    ),  # the last of them, as 2027-01-31
    Column("audit_sequence", BigInteger, nullable=False, server_default="0"),  # the newest row of audit
    Column("audit_chain", LargeBinary),  # and its link
    Column("compatible_from", _bytewise(32), nullable=False, server_default="0006"),  # see COMPATIBLE_FROM
    CheckConstraint("id = 1", name="one_row"),
)

changes = Table(
    "changes",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("scope", _bytewise(16), nullable=False),
    Column("first_id", BigInteger, nullable=False),
    Column("last_id", BigInteger, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    CheckConstraint("scope IN ('device', 'realm')", name="scope"),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", _bytewise(128), nullable=False),
    Column("source", _bytewise(255), nullable=False),
    Column("action", _bytewise(32), nullable=False),
    Column("subject", _bytewise(256), nullable=False),
    Column("detail", _text(), nullable=False),  # a JSON object; never a key
    Column("previous", BigInteger),  # the sequence of the row before; 0: this is the first
    Column("chain", LargeBinary),  # its link, see `audit`
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", _bytewise(32), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
)
