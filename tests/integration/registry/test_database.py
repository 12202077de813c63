"""Databases that are away, locked, foreign or replaced, and writers that stand in each other's way."""

import multiprocessing
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, select, update

from gateway.errors import ConfigurationError, RegistryMismatch, RegistryUnavailable
from gateway.registry import database, feed, schema
from gateway.registry.database import make_engine, read, write
from gateway.registry.ledger import Author
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry
from tests.support.database_server import DatabaseServer

AUTHOR = Author("alice", "console.example")
DEADLINE_S = 30

NewRegistry = Callable[[str, Path], RegistrySettings]


@pytest.fixture
def sqlite_settings(tmp_path: Path, new_registry: NewRegistry) -> RegistrySettings:
    return new_registry(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path)


@pytest.fixture
def sqlite_engine(sqlite_settings: RegistrySettings) -> Iterator[Engine]:
    engine = make_engine(sqlite_settings.url)
    yield engine
    engine.dispose()


def sequence(engine: Engine) -> int:
    with read(engine) as connection:
        return feed.head(connection).sequence


def add_many(settings: RegistrySettings, writer: int, number: int) -> None:
    with Registry(settings, AUTHOR) as registry:
        for index in range(number):
            registry.add_device(NewDevice(identity=f"m-{writer}-{index}"))


def test_processes_that_write_to_one_sqlite_file_wait_for_each_other(
    sqlite_settings: RegistrySettings, sqlite_engine: Engine
) -> None:
    writers, each = 4, 25
    with ProcessPoolExecutor(writers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(add_many, sqlite_settings, writer, each) for writer in range(writers)]:
            done.result()
    assert sequence(sqlite_engine) == 1 + writers * each


def test_a_write_that_read_first_does_not_fail_when_another_wrote_meanwhile(sqlite_engine: Engine) -> None:
    """With a deferred transaction the second writer fails at once, whatever its busy time-out."""
    first_has_read, second_started = threading.Event(), threading.Event()

    def bump(connection: Connection) -> int:
        number = connection.execute(select(schema.feed.c.sequence)).scalar_one()
        first_has_read.set()
        assert second_started.wait(DEADLINE_S)
        connection.execute(update(schema.feed).values(sequence=number + 1))
        return int(number)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write, sqlite_engine, bump)
        assert first_has_read.wait(DEADLINE_S)
        second = pool.submit(write, sqlite_engine, bump)
        second_started.set()
        assert {first.result(DEADLINE_S), second.result(DEADLINE_S)} == {1, 2}


def test_a_locked_sqlite_file_is_unavailable(
    sqlite_settings: RegistrySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.05)
    holder = sqlite3.connect(sqlite_settings.url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with (
            Registry(sqlite_settings, AUTHOR) as registry,
            pytest.raises(RegistryUnavailable, match="database is locked"),
        ):
            registry.add_device(NewDevice(identity="m"))
    finally:
        holder.close()


def test_readers_are_not_disturbed_by_a_writer(sqlite_engine: Engine) -> None:
    def work(connection: Connection) -> int:
        connection.execute(update(schema.feed).values(sequence=100))
        return sequence(sqlite_engine)

    assert write(sqlite_engine, work) == 1
    assert sequence(sqlite_engine) == 100


def test_a_failed_write_leaves_nothing(sqlite_engine: Engine) -> None:
    def work(connection: Connection) -> None:
        connection.execute(update(schema.feed).values(sequence=100))
        raise KeyError

    with pytest.raises(KeyError):
        write(sqlite_engine, work)
    assert sequence(sqlite_engine) == 1
    write(sqlite_engine, lambda connection: connection.execute(update(schema.feed).values(sequence=2)))


def test_a_replaced_sqlite_file_is_noticed(
    sqlite_settings: RegistrySettings, sqlite_engine: Engine, tmp_path: Path, new_registry: NewRegistry
) -> None:
    add_many(sqlite_settings, 0, 3)
    assert sequence(sqlite_engine) == 4
    (tmp_path / "other").mkdir()
    new_registry(f"sqlite:///{tmp_path / 'other' / 'registry.db'}", tmp_path / "other")
    (tmp_path / "other" / "registry.db").replace(tmp_path / "registry.db")
    assert sequence(sqlite_engine) == 1


def test_an_sqlite_file_that_went_away_and_came_back(sqlite_engine: Engine, tmp_path: Path) -> None:
    assert sequence(sqlite_engine) == 1
    (tmp_path / "registry.db").rename(tmp_path / "away.db")
    with pytest.raises(RegistryUnavailable, match=r"registry\.db does not exist"):
        sequence(sqlite_engine)
    assert not (tmp_path / "registry.db").exists()
    (tmp_path / "away.db").rename(tmp_path / "registry.db")
    assert sequence(sqlite_engine) == 1


def test_a_file_that_is_no_database_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("this is not a database, however long one looks at it\n" * 100)
    engine = make_engine(f"sqlite:///{tmp_path / 'registry.db'}")
    with pytest.raises(RegistryMismatch, match="file is not a database"):
        sequence(engine)
    engine.dispose()


def test_a_database_without_our_tables_is_a_mismatch(url: str) -> None:
    engine = make_engine(url, create=True)
    with pytest.raises(RegistryMismatch, match="has not the tables") as mismatch:
        sequence(engine)
    assert "\n" not in str(mismatch.value)
    engine.dispose()


def test_what_deadlocks_is_tried_again(server_settings: RegistrySettings) -> None:
    """Two writers that take two rows in opposite order: the server ends one of them, and its second try succeeds."""
    add_many(server_settings, 0, 2)
    engine = make_engine(server_settings.url)
    both_hold_one = threading.Barrier(2)
    tries = {"ab": 0, "ba": 0}

    def work(order: str) -> Callable[[Connection], None]:
        names = {"a": "m-0-0", "b": "m-0-1"}

        def run(connection: Connection) -> None:
            tries[order] += 1
            for position, which in enumerate(order):
                connection.execute(
                    update(schema.devices)
                    .where(schema.devices.c.name == names[which])
                    .values(group_name=order)
                )
                if position == 0 and tries[order] == 1:
                    both_hold_one.wait(DEADLINE_S)

        return run

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write, engine, work(order)) for order in tries]:
            done.result(DEADLINE_S)
    assert sorted(tries.values()) == [1, 2]
    engine.dispose()


def test_a_lock_that_is_held_too_long_is_unavailable(
    server_settings: RegistrySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOCK_TIMEOUT_S", 1)
    holder = make_engine(server_settings.url)
    with holder.begin() as connection, Registry(server_settings, AUTHOR) as registry:
        connection.execute(select(schema.feed).with_for_update())
        with pytest.raises(RegistryUnavailable, match=r"lock timeout|Lock wait timeout"):
            registry.add_device(NewDevice(identity="m"))
    holder.dispose()
    with Registry(server_settings, AUTHOR) as registry:
        assert registry.devices() == []


@pytest.mark.usefixtures("_forgotten_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_stops_is_unavailable_and_found_again(
    server_settings: RegistrySettings, server: DatabaseServer
) -> None:
    engine = make_engine(server_settings.url)
    assert sequence(engine) == 1
    server.stop()
    try:
        with pytest.raises(RegistryUnavailable, match="is away"):
            sequence(engine)
    finally:
        server.start()
    assert sequence(engine) == 1
    engine.dispose()


def test_errors_show_no_parameters(sqlite_engine: Engine) -> None:
    def work(connection: Connection) -> None:
        connection.execute(
            schema.secrets.insert().values(
                name="fingerprint", sealed=b"a sealed thing that nobody needs to see"
            )
        )

    with pytest.raises(Exception, match="UNIQUE constraint failed") as refusal:
        write(sqlite_engine, work)
    chain: BaseException | None = refusal.value
    while chain is not None:
        assert "a sealed thing" not in str(chain)
        chain = chain.__cause__


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    with pytest.raises(
        ConfigurationError,
        match=r"registry\.url needs the package pymysql: run `pip install 'psk-gateway\[mariadb\]'`",
    ):
        make_engine("mysql+pymysql://u@h/d")
