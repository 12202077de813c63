"""The order of the change feed under concurrent writers: a reader of `sequence > last` can miss nothing."""

import datetime as dt
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, Engine, func, insert, select

from gateway.registry import feed, schema
from gateway.registry.database import make_engine, read, write
from gateway.registry.ledger import Author, Entry, Ledger, utc_now
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewCredential, NewDevice, Registry

AUTHOR = Author("alice", "console.example")
LEDGER = Ledger(AUTHOR, utc_now, bytes(32))
DEADLINE_S = 30
LOCKS_WAITED_FOR = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
}


@pytest.fixture
def server_engine(server_settings: RegistrySettings) -> Iterator[Engine]:
    engine = make_engine(server_settings.url)
    yield engine
    engine.dispose()


def add_device(connection: Connection, name: str) -> int:
    result = connection.execute(
        insert(schema.devices).values(
            realm_id=1, name=name, labels="{}", networks="[]", disabled=False, created_at=utc_now()
        )
    )
    assert result.inserted_primary_key is not None
    return int(result.inserted_primary_key[0])


def seen_after(engine: Engine, sequence: int) -> list[int]:
    with read(engine) as connection:
        return [change.sequence for change in feed.changes_after(connection, sequence, 1000)]


def test_a_writer_that_commits_late_is_not_skipped(engine: Engine) -> None:
    """The slow writer has its sequence first; the quick one waits for it, so the order of commits is theirs too."""
    slow_has_sequence, slow_may_commit = threading.Event(), threading.Event()
    committed: list[str] = []

    def slow() -> int:
        def work(connection: Connection) -> int:
            device_id = add_device(connection, "slow")
            entry = Entry("device", device_id, device_id, "add-device", "slow")
            sequence = LEDGER.record(connection, entry)
            slow_has_sequence.set()
            assert slow_may_commit.wait(DEADLINE_S)
            committed.append("slow")
            return sequence

        return write(engine, work)

    def quick() -> int:
        def work(connection: Connection) -> int:
            device_id = add_device(connection, "quick")
            entry = Entry("device", device_id, device_id, "add-device", "quick")
            sequence = LEDGER.record(connection, entry)
            committed.append("quick")
            return sequence

        return write(engine, work)

    with ThreadPoolExecutor(2) as pool:
        slow_done = pool.submit(slow)
        assert slow_has_sequence.wait(DEADLINE_S)
        quick_done = pool.submit(quick)
        wait_for_a_lock(engine)
        assert (
            seen_after(engine, 1) == []
        )  # neither is committed, and nobody sees the second before the first
        assert not quick_done.done()
        slow_may_commit.set()
        assert (slow_done.result(DEADLINE_S), quick_done.result(DEADLINE_S)) == (2, 3)
    assert committed == ["slow", "quick"]
    assert seen_after(engine, 1) == [2, 3]


def wait_for_a_lock(engine: Engine) -> None:
    """Until some session waits for another. One of SQLite waits before it begins, and shows it to nobody."""
    query = LOCKS_WAITED_FOR.get(engine.dialect.name)
    if query is None:
        return
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with engine.connect() as connection:
            if connection.exec_driver_sql(query).scalar_one():
                return
        assert time.monotonic() < deadline, "nobody waits for a lock"
        time.sleep(0.15)  # MariaDB looks anew only when it was not asked for 0.1 s


def test_a_long_write_holds_the_feed_at_its_end_only(server_engine: Engine) -> None:
    """A writer with its rows done and no sequence yet stands in nobody's way, and comes second."""
    engine = server_engine
    slow_has_rows, slow_may_go_on = threading.Event(), threading.Event()

    def slow() -> int:
        def work(connection: Connection) -> int:
            device_id = add_device(connection, "slow")
            slow_has_rows.set()
            assert slow_may_go_on.wait(DEADLINE_S)
            entry = Entry("device", device_id, device_id, "add-device", "slow")
            return LEDGER.record(connection, entry)

        return write(engine, work)

    def quick(connection: Connection) -> int:
        device_id = add_device(connection, "quick")
        return LEDGER.record(connection, Entry("device", device_id, device_id, "a", "q"))

    with ThreadPoolExecutor(1) as pool:
        slow_done = pool.submit(slow)
        assert slow_has_rows.wait(DEADLINE_S)
        assert write(engine, quick) == 2
        assert seen_after(engine, 1) == [2]
        slow_may_go_on.set()
        assert slow_done.result(DEADLINE_S) == 3
    assert seen_after(engine, 2) == [3]


def test_writers_that_have_their_rows_do_not_stand_in_each_others_way(
    server_settings: RegistrySettings,
) -> None:
    """None has locked the row of the feed to read it: whoever takes it first goes first, and nobody begins anew."""
    writers = 4
    all_have_rows = threading.Barrier(writers)

    def add(writer: int) -> int:
        asked = 0

        def now() -> dt.datetime:  # asked for when the rows are made, and when their change is noted
            nonlocal asked
            asked += 1
            if asked == 2:
                all_have_rows.wait(DEADLINE_S)
            return utc_now()

        with Registry(server_settings, AUTHOR, now=now) as registry:
            registry.add_device(NewDevice(identity=f"m-{writer}"))
        return asked

    with ThreadPoolExecutor(writers) as pool:
        asked = [pool.submit(add, writer) for writer in range(writers)]
        assert [future.result() for future in asked] == [2] * writers


def test_a_reader_beside_many_writers_sees_every_change_once_and_in_order(
    settings: RegistrySettings, engine: Engine
) -> None:
    writers, each = 4, 15
    start = threading.Barrier(writers + 1)

    def add(writer: int) -> None:
        with Registry(settings, AUTHOR) as registry:
            start.wait(DEADLINE_S)
            for number in range(each):
                registry.add_device(NewDevice(identity=f"m-{writer}-{number}"))

    seen: list[int] = []
    with ThreadPoolExecutor(writers) as pool:
        done = [pool.submit(add, writer) for writer in range(writers)]
        start.wait(DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while len(seen) < writers * each and time.monotonic() < deadline:
            seen += seen_after(engine, seen[-1] if seen else 1)
        for future in done:
            future.result()
    assert seen == list(range(2, 2 + writers * each))
    with read(engine) as connection:
        assert feed.head(connection).sequence == seen[-1]
        assert connection.execute(select(func.count()).select_from(schema.devices)).scalar() == writers * each


def test_one_of_two_that_add_the_same_identity_is_refused(settings: RegistrySettings, engine: Engine) -> None:
    """Both look before either has committed; the loser learns it from the constraint."""
    writers = 4
    start = threading.Barrier(writers)

    def add() -> str:
        with Registry(settings, AUTHOR) as registry:
            start.wait(DEADLINE_S)
            try:
                registry.add_device(NewDevice(identity="same"))
            except Exception as exc:  # noqa: BLE001 - whatever it is, the assertion below shows it
                return f"{type(exc).__name__}: {exc}"
            return "added"

    with ThreadPoolExecutor(writers) as pool:
        outcomes = sorted(future.result() for future in [pool.submit(add) for _ in range(writers)])
    assert outcomes[-1] == "added"
    assert all(outcome.startswith("RegistryRefused: ") and "taken" in outcome for outcome in outcomes[:-1])
    assert seen_after(engine, 1) == [2]


def test_pages_of_credentials_are_whole(
    settings: RegistrySettings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_PAGE_ROWS", 3)
    monkeypatch.setattr(feed, "_RANGES_PER_STATEMENT", 2)
    with Registry(settings, AUTHOR) as registry:
        for number in range(7):
            registry.add_device(NewDevice(identity=f"m-{number}"))
        registry.set_device_enabled("default", "m-3", enabled=False)
        ids = {device.name: device.id for device in registry.devices()}
    with read(engine) as connection:
        pages = list(feed.credential_pages(connection))
        assert [len(page) for page in pages] == [3, 3, 1]
        records = {key[8:].decode(): record for page in pages for key, record in page.items()}
        assert sorted(records) == sorted(ids)
        assert [name for name, record in records.items() if record.disabled] == ["m-3"]
        assert all(
            record.device_id == ids[name] and record.device == name for name, record in records.items()
        )
        ranges = [(ids["m-0"], ids["m-1"]), (ids["m-3"], ids["m-3"]), (ids["m-5"], ids["m-6"] + 100)]
        found = feed.credentials_of_devices(connection, ranges)
        assert sorted(key[8:] for key in found) == [b"m-0", b"m-1", b"m-3", b"m-5", b"m-6"]


def test_credentials_are_counted_by_state(settings: RegistrySettings, engine: Engine) -> None:
    now = utc_now()
    hour = utc_now().replace(year=now.year + 1) - now
    with Registry(settings, AUTHOR) as registry:
        registry.add_device(NewDevice(identity="active", not_before=now - hour, not_after=now + hour))
        registry.add_device(NewDevice(identity="expired", not_after=now))
        registry.add_device(NewDevice(identity="early", not_before=now + hour))
        registry.add_device(NewDevice(identity="disabled"))
        registry.set_device_enabled("default", "disabled", enabled=False)
    with read(engine) as connection:
        states = feed.credential_states(connection, now.timestamp())
    assert states == {"active": 1, "expired": 1, "not_yet_valid": 1, "disabled": 1, "revoked": 0, "idle": 0}


def test_devices_are_counted_that_will_be_shut_out(settings: RegistrySettings, engine: Engine) -> None:
    now = utc_now()
    day = dt.timedelta(days=1)
    with Registry(settings, AUTHOR) as registry:
        registry.add_device(NewDevice(identity="lasting"))
        registry.add_device(NewDevice(identity="ended", not_after=now - day))
        registry.add_device(NewDevice(identity="far", not_after=now + 15 * day))
        registry.add_device(NewDevice(identity="near", not_after=now + 13 * day))
        registry.add_device(NewDevice(identity="disabled", not_after=now + day))
        registry.set_device_enabled("default", "disabled", enabled=False)
        registry.add_device(NewDevice(identity="rotated"))
        registry.rotate_key("default", "rotated", NewCredential(grace=day))

        def expiring() -> int:
            with read(engine) as connection:
                return feed.devices_expiring(connection, now.timestamp(), 14 * day.total_seconds())

        assert expiring() == 2  # near, and rotated until it has come with its new key
        with read(engine) as connection:
            newest = connection.execute(select(func.max(schema.credentials.c.id))).scalar_one()
        registry.record_uses({newest: now})
        assert expiring() == 1
