"""Engines for the registry, and the one place where errors of databases become ours.

A write goes through `write`: on SQLite it begins with BEGIN IMMEDIATE (a transaction that reads first and writes then
fails at once when another wrote meanwhile, whatever its busy time-out), on the servers it is READ COMMITTED with lock
time-outs; what failed for the sake of another writer is tried again. A read goes through `read` and always ends its
transaction.
"""

import contextlib
import itertools
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.pool import ConnectionPoolEntry

from gateway.errors import ConfigurationError, RegistryMismatch, RegistryRefused, RegistryUnavailable

__all__ = ["CHANNEL", "make_engine", "mapped_errors", "postgresql_arguments", "read", "write"]

T = TypeVar("T")

CHANNEL = "pskgw_feed"
"""On which PostgreSQL tells of changes. A channel is of one database, so one name does for all registries."""

_CONNECT_TIMEOUT_S = 5
_BUSY_TIMEOUT_S = 5
_LOCK_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_S = 60
_PEER_SILENT_S = 15  # a server that answers nothing, not even TCP, is away after this
_ATTEMPTS_MAX = 5
_RETRY_TIMEOUT_S = 10
_BACKOFF_S = 0.02
_WRITING = "registry_writing"

_RETRY_SQLSTATES = {"40001", "40P01"}  # serialization_failure, deadlock_detected
_RETRY_MYSQL_ERRORS = {1020, 1213}  # ER_CHECKREAD, ER_LOCK_DEADLOCK
_EXTRAS = {"pymysql": "psk-gateway[mariadb]"}


def make_engine(url: str, *, create: bool = False) -> Engine:
    """An engine for a URL as `RegistrySettings` has it; nothing is connected yet.

    Args:
        url: of the registry.
        create: whether an SQLite file that is missing is made; otherwise it counts as away.

    Raises:
        ConfigurationError: the driver is not installed.

    """
    parsed = make_url(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            return _sqlite_engine(parsed, create=create)
        if parsed.get_backend_name() == "postgresql":
            return _postgresql_engine(parsed)
        return _mysql_engine(parsed)
    except ModuleNotFoundError as exc:
        wanted = _EXTRAS.get(exc.name or "", exc.name)
        raise ConfigurationError(
            f"registry.url needs the package {exc.name}: run `pip install '{wanted}'`"
        ) from exc


@contextlib.contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """A connection to read with; its transaction ends with the block.

    Raises:
        RegistryUnavailable, RegistryMismatch: see `mapped_errors`.

    """
    with mapped_errors(engine), engine.connect() as connection:
        yield connection


def write(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run `work` in a write transaction and commit it, again from the start when another writer stood in its way.

    Raises:
        RegistryUnavailable, RegistryMismatch, RegistryRefused: see `mapped_errors`; nothing was written.

    """
    writing = engine.execution_options(**{_WRITING: True})
    give_up_at = time.monotonic() + _RETRY_TIMEOUT_S
    with mapped_errors(engine):
        for attempt in itertools.count(1):
            try:
                with writing.begin() as connection:
                    return work(connection)
            except DBAPIError as exc:
                if attempt == _ATTEMPTS_MAX or time.monotonic() > give_up_at or not _worth_retrying(exc):
                    raise
            time.sleep(_BACKOFF_S * 2**attempt * random.random())  # noqa: S311 - spreads writers, guards nothing
    raise AssertionError("the loop returns or raises")


@contextlib.contextmanager
def mapped_errors(engine: Engine) -> Iterator[None]:
    """Turn what SQLAlchemy raises into our errors.

    Raises:
        RegistryUnavailable: away, locked, full or too slow.
        RegistryMismatch: it answers, but it is not a registry that this program knows.
        RegistryRefused: a constraint was broken that nobody checked before.

    """
    try:
        yield
    except DBAPIError as exc:
        where = f"the registry {engine.url.render_as_string(hide_password=True)}"
        if isinstance(exc, IntegrityError):
            raise RegistryRefused(f"{where} refused the change: {_first_line(exc)}") from exc
        if _is_foreign(exc):
            raise RegistryMismatch(
                f"{where} has not the tables that this program knows ({_first_line(exc)}): run `gatewayctl migrate`"
            ) from exc
        raise RegistryUnavailable(f"{where} is away: {_first_line(exc)}") from exc
    except SQLAlchemyError as exc:  # of the pool: no connection within its time-out
        raise RegistryUnavailable(f"the registry is away: {exc}") from exc


def _first_line(exc: DBAPIError) -> str:
    """What the database said, without the statement and its parameters."""
    return (str(exc.orig).splitlines() or [type(exc.orig).__name__])[0]


def _is_foreign(exc: DBAPIError) -> bool:
    if isinstance(exc.orig, sqlite3.Error):
        code = getattr(exc.orig, "sqlite_errorcode", 0) & 0xFF
        return code in {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
    return isinstance(exc, ProgrammingError)


def _worth_retrying(exc: DBAPIError) -> bool:
    if isinstance(exc.orig, sqlite3.Error):
        return getattr(exc.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
    if getattr(exc.orig, "sqlstate", None) in _RETRY_SQLSTATES:
        return True
    number = next(iter(getattr(exc.orig, "args", ())), None)
    return number in _RETRY_MYSQL_ERRORS


def _sqlite_engine(url: URL, *, create: bool) -> Engine:
    path = Path(url.database or "")

    def connect() -> sqlite3.Connection:
        if create:
            _create_private(path)
        elif not path.exists():
            raise sqlite3.OperationalError(f"{path} does not exist, `gatewayctl migrate` makes it")
        # no check of threads: the pool hands a connection to one thread at a time
        return sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,  # the listener below begins transactions, not the module
            check_same_thread=False,
        )

    engine = create_engine(url, creator=connect, hide_parameters=True)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "checkout", _check_sqlite_file)
    return engine


def _create_private(path: Path) -> None:
    """An empty file that its owner alone may read, when there is none."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as exc:
        raise sqlite3.OperationalError(f"{path} cannot be made: {exc.strerror}") from exc


def _set_up_sqlite(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
    _switch_to_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    record.info["file"] = _file_identity(connection)


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """The switch of a new file is the one statement that the busy time-out does not hold for."""
    give_up_at = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(_BACKOFF_S)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get(_WRITING, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _check_sqlite_file(connection: sqlite3.Connection, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Let go of a file that was replaced or moved away: its name may stand for another registry now."""
    if record.info["file"] != _file_identity(connection):
        raise DisconnectionError("the file was replaced")


def _file_identity(connection: sqlite3.Connection) -> tuple[int, int] | None:
    (_, _, path), *_ = connection.execute("PRAGMA database_list")
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgresql_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        connect_args=_postgresql_defaults(url),
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_timeout=_CONNECT_TIMEOUT_S,
    )
    event.listen(engine, "connect", _set_up_postgresql)
    return engine


def postgresql_arguments(url: str) -> dict[str, Any]:
    """What psycopg connects with for a URL as `RegistrySettings` has it."""
    engine = _postgresql_engine(make_url(url))
    _, arguments = engine.dialect.create_connect_args(engine.url)
    return {**_postgresql_defaults(engine.url), **arguments}


def _postgresql_defaults(url: URL) -> dict[str, Any]:
    """How a connection is made, as far as the URL says nothing."""
    defaults = {
        "application_name": "psk-gateway",
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": _PEER_SILENT_S * 1000,
    }
    return {name: value for name, value in defaults.items() if name not in url.query}


def _set_up_postgresql(connection: Any, _record: ConnectionPoolEntry) -> None:
    connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'")
    connection.execute(f"SET statement_timeout = '{_STATEMENT_TIMEOUT_S}s'")
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_STATEMENT_TIMEOUT_S}s'")
    connection.commit()


def _mysql_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        connect_args={
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _STATEMENT_TIMEOUT_S,
            "write_timeout": _STATEMENT_TIMEOUT_S,
        },
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_timeout=_CONNECT_TIMEOUT_S,
    )
    event.listen(engine, "connect", _set_up_mysql)
    return engine


def _set_up_mysql(connection: Any, _record: ConnectionPoolEntry) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"SET SESSION innodb_lock_wait_timeout = {_LOCK_TIMEOUT_S}, "
            f"max_statement_time = {_STATEMENT_TIMEOUT_S}, idle_transaction_timeout = {_STATEMENT_TIMEOUT_S}"
        )
