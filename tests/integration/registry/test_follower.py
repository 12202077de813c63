"""From a change in the registry to the replica and to what workers are told, on every database."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Connection, Engine, delete, insert, select, update

from gateway.errors import ConfigurationError, RegistryMismatch, RegistryUnavailable
from gateway.registry import feed, follower as follower_module, ledger, schema
from gateway.registry.database import make_engine, write
from gateway.registry.follower import Follower
from gateway.registry.ledger import Author, Entry, Ledger, utc_now
from gateway.registry.notices import Changed, Notice, Published
from gateway.registry.realms import NewRealm
from gateway.registry.records import CredentialRecord
from gateway.registry.replica import MAP_BYTES, current_generation
from gateway.registry.reports import Newcomer, Reports
from gateway.registry.sealing import MasterKey, Sealer, credential_context, secret_context
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry
from tests.integration.registry import lookups
from tests.integration.registry.lookups import View
from tests.support.capabilities import fill, needed_small_disk
from tests.support.database_server import DatabaseServer

AUTHOR = Author("alice", "console.example")
LEDGER = Ledger(AUTHOR, utc_now, bytes(32))


class Clock:
    def __init__(self) -> None:
        self.now = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replica_dir(tmp_path: Path) -> Path:
    return tmp_path / "data" / "replica"


@pytest.fixture
def follower(settings: RegistrySettings, replica_dir: Path, clock: Clock) -> Iterator[Follower]:
    """Open, with the first copy made."""
    with opened(settings, replica_dir, clock) as follower:
        assert [type(notice) for notice in poll(follower)] == [Published]
        yield follower


@contextlib.contextmanager
def opened(
    settings: RegistrySettings, replica_dir: Path, clock: Clock, *, map_bytes: int = MAP_BYTES
) -> Iterator[Follower]:
    follower = Follower(settings, replica_dir, wall=clock, map_bytes=map_bytes)
    follower.open()
    try:
        yield follower
    finally:
        follower.close()


def poll(follower: Follower) -> list[Notice]:
    """Poll until there is nothing more, as the shell does."""
    notices = follower.poll()
    while follower.behind:
        notices += follower.poll()
    return notices


def poll_once(follower: Follower) -> Changed:
    """The one change that a poll finds."""
    (notice,) = poll(follower)
    assert isinstance(notice, Changed)
    # it is made to be sent
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(notice), type=Notice) == notice
    return notice


class Worker:
    """Looks into the replica from another process."""

    def __init__(self, pool: ProcessPoolExecutor, replica_dir: Path) -> None:
        self._pool = pool
        self._replica_dir = replica_dir

    def look(self, *identities: str, realm_id: int = 1) -> View:
        generation = current_generation(self._replica_dir)
        assert generation is not None
        return self._pool.submit(lookups.look, str(generation), identities, realm_id).result()


@pytest.fixture
def look(worker: ProcessPoolExecutor, replica_dir: Path) -> Worker:
    return Worker(worker, replica_dir)


# From the registry to the workers


def test_the_first_copy_holds_everything(
    settings: RegistrySettings, registry: Registry, replica_dir: Path, clock: Clock, look: Worker
) -> None:
    registry.add_realm("plant", hint="plant-7")
    added = registry.add_device(
        NewDevice(identity="a", group="meters", labels={"site": "north"}, networks=["10.0.0.0/8"])
    )
    registry.add_device(NewDevice(identity="b"))
    registry.set_device_enabled("default", "b", enabled=False)

    with opened(settings, replica_dir, clock) as follower:
        assert current_generation(replica_dir) is None
        (notice,) = poll(follower)
        assert isinstance(notice, Published)
        assert Path(notice.path) == current_generation(replica_dir)
        assert notice.sequence == follower.status.sequence == 5
        assert follower.status.polled_at == clock.now
        assert follower.progress is None

        view = look.look("a", "b", "c")
        assert view.sequence == 5
        assert view.realms == {"default": None, "plant": "plant-7"}
        assert sorted(view.credentials) == ["a", "b"]
        a = view.credentials["a"]
        assert (a.device, a.group, a.labels, a.networks) == (
            "a",
            "meters",
            {"site": "north"},
            ("10.0.0.0/8",),
        )
        assert (a.enabled, view.credentials["b"].enabled) == (True, False)
        sealer = Sealer([MasterKey.from_file(settings.master_key_file)])
        assert sealer.open(a.sealed_key, credential_context(1, b"a")) == added.key.reveal()
        assert poll(follower) == []


def test_a_device_that_is_added_disabled_enabled_and_removed(
    follower: Follower, registry: Registry, look: Worker
) -> None:
    assert poll(follower) == []

    registry.add_device(NewDevice(identity="m"))
    device_id = registry.device("default", "m").id
    notice = poll_once(follower)
    assert (notice.sequence, notice.devices, notice.realms) == (2, ((device_id, device_id),), False)
    assert notice.committed_at == pytest.approx(
        1893585600.123456
    )  # the time of the change, as the writer had it
    assert notice.overlay == {}
    assert look.look("m").credentials["m"].enabled

    registry.set_device_enabled("default", "m", enabled=False)
    assert poll_once(follower).devices == ((device_id, device_id),)
    assert look.look("m").credentials["m"].disabled

    registry.set_device_enabled("default", "m", enabled=True)
    poll_once(follower)
    assert look.look("m").credentials["m"].enabled

    registry.remove_device("default", "m")
    notice = poll_once(follower)
    assert (notice.sequence, notice.devices) == (5, ((device_id, device_id),))
    view = look.look("m")
    assert (view.credentials, view.sequence) == ({}, 5)
    assert poll(follower) == []


def test_a_new_realm_is_told(follower: Follower, registry: Registry, look: Worker) -> None:
    realm = registry.add_realm("plant", hint="plant-7")
    notice = poll_once(follower)
    assert (notice.devices, notice.realms) == ((), True)
    assert look.look().realms == {"default": None, "plant": "plant-7"}
    registry.add_device(NewDevice(identity="m", realm="plant"))
    assert not poll_once(follower).realms
    assert look.look("m", realm_id=realm.id).credentials["m"].realm_id == realm.id
    assert look.look("m", realm_id=1).credentials == {}


def test_several_changes_between_two_polls_are_one_notice(
    follower: Follower, registry: Registry, look: Worker
) -> None:
    for name in ("a", "b", "c", "d"):
        registry.add_device(NewDevice(identity=name))
    ids = {device.name: device.id for device in registry.devices()}
    poll(follower)
    registry.remove_device("default", "a")
    registry.add_device(NewDevice(identity="a"))
    registry.set_device_enabled("default", "c", enabled=False)
    new = registry.device("default", "a").id
    notice = poll_once(follower)
    assert notice.devices == ((ids["a"], ids["a"]), (ids["c"], ids["c"]), (new, new))
    view = look.look("a", "c")
    assert view.credentials["a"].device_id == new
    assert view.credentials["c"].disabled


def import_devices(engine: Engine, number: int, prefix: str = "m") -> tuple[int, int]:
    """As an import does it: many devices, one transaction, one change."""

    def work(connection: Connection) -> tuple[int, int]:
        now = utc_now()
        devices = [
            {
                "realm_id": 1,
                "name": f"{prefix}-{index}",
                "labels": "{}",
                "networks": "[]",
                "disabled": False,
                "created_at": now,
            }
            for index in range(number)
        ]
        connection.execute(insert(schema.devices), devices)
        rows = connection.execute(
            select(schema.devices.c.id, schema.devices.c.name).where(
                schema.devices.c.name.startswith(f"{prefix}-")
            )
        ).all()
        connection.execute(
            insert(schema.credentials),
            [
                {
                    "device_id": row.id,
                    "realm_id": 1,
                    "identity": row.name,
                    "sealed_key": bytes(65),
                    "fingerprint": bytes(16),
                    "hash": "sha256",
                    "created_at": now,
                }
                for row in rows
            ],
        )
        ids = [row.id for row in rows]
        LEDGER.record(connection, Entry("device", min(ids), max(ids), "import", ""))
        return min(ids), max(ids)

    return write(engine, work)


def test_an_import_is_one_change(follower: Follower, engine: Engine, look: Worker) -> None:
    span = import_devices(engine, 3000)
    notice = poll_once(follower)
    assert (notice.sequence, notice.devices, notice.overlay) == (2, (span,), {})
    names = [f"m-{index}" for index in range(3000)]
    assert sorted(look.look(*names).credentials) == sorted(names)


def test_a_backlog_is_taken_in_portions(
    follower: Follower, engine: Engine, look: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "_DEVICES_PER_POLL", 25)
    spans = [import_devices(engine, 10, f"batch{number}") for number in range(5)]
    polls = [(follower.poll(), follower.behind) for _ in range(2)]
    assert [behind for _, behind in polls] == [True, False]
    one, two = (notice for notices, _ in polls for notice in notices)
    assert isinstance(one, Changed)
    assert isinstance(two, Changed)
    assert (one.sequence, two.sequence) == (4, 6)
    assert one.devices == ((spans[0][0], spans[2][1]),)
    assert two.devices == ((spans[3][0], spans[4][1]),)
    assert (
        len(look.look(*(f"batch{number}-{index}" for number in range(5) for index in range(10))).credentials)
        == 50
    )


def test_a_copy_is_paged_and_says_how_far_it_is(
    settings: RegistrySettings,
    engine: Engine,
    replica_dir: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_devices(engine, 10)
    monkeypatch.setattr(feed, "_PAGE_ROWS", 4)
    seen = []
    pages = feed.credential_pages

    with opened(settings, replica_dir, clock) as follower:

        def watched(connection: Connection) -> Iterator[feed.Credentials]:
            for page in pages(connection):
                seen.append(follower.progress)
                yield page

        monkeypatch.setattr(feed, "credential_pages", watched)
        poll(follower)
        assert [(progress.copied, progress.total) for progress in seen if progress] == [
            (0, 10),
            (4, 10),
            (8, 10),
        ]


def test_what_is_written_during_a_copy_is_not_lost(
    *,
    settings: RegistrySettings,
    registry: Registry,
    replica_dir: Path,
    clock: Clock,
    look: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row may be copied and then removed, or added behind the page: the changes since say so."""
    for name in ("a", "b", "c"):
        registry.add_device(NewDevice(identity=name))
    monkeypatch.setattr(feed, "_PAGE_ROWS", 2)
    pages = feed.credential_pages

    def disturbed(connection: Connection) -> Iterator[feed.Credentials]:
        for number, page in enumerate(pages(connection)):
            if number == 0:
                registry.remove_device("default", "a")
                registry.add_device(NewDevice(identity="a"))
                registry.set_device_enabled("default", "b", enabled=False)
                registry.remove_device("default", "c")
                registry.add_device(NewDevice(identity="d"))
            yield page

    monkeypatch.setattr(feed, "credential_pages", disturbed)
    with opened(settings, replica_dir, clock) as follower:
        (published, changed) = poll(follower)
        assert isinstance(published, Published)
        assert isinstance(changed, Changed)
        assert (published.sequence, changed.sequence) == (4, 9)
        view = look.look("a", "b", "c", "d")
        assert sorted(view.credentials) == ["a", "b", "d"]
        assert view.credentials["a"].device_id == registry.device("default", "a").id
        assert view.credentials["b"].disabled


# Restarts, and registries that are others


def test_a_restart_goes_on_where_it_was(
    settings: RegistrySettings, registry: Registry, replica_dir: Path, clock: Clock, look: Worker
) -> None:
    with opened(settings, replica_dir, clock) as first:
        poll(first)
    generation = current_generation(replica_dir)
    registry.add_device(NewDevice(identity="m"))
    again = Follower(settings, replica_dir, wall=clock)
    assert again.open() == generation
    assert again.status.sequence == 1
    assert poll_once(again).sequence == 2
    again.close()
    assert current_generation(replica_dir) == generation
    assert sorted(look.look("m").credentials) == ["m"]


def test_the_age_of_the_replica_survives_a_restart(
    settings: RegistrySettings, replica_dir: Path, clock: Clock
) -> None:
    started = clock.now
    with opened(settings, replica_dir, clock) as first:
        poll(first)
        clock.now += 59
        assert poll(first) == []
        clock.now += 30
        assert poll(first) == []
        clock.now += 30
        assert poll(first) == []
        assert first.status.polled_at == started + 119
    with opened(settings, replica_dir, clock) as again:
        assert again.status.polled_at == started + 89  # stored once a minute


def test_an_available_replica_needs_no_registry(
    settings: RegistrySettings, replica_dir: Path, clock: Clock
) -> None:
    with opened(settings, replica_dir, clock) as first:
        poll(first)
    away = settings.model_copy(update={"url": f"sqlite:///{replica_dir}/away.db"})
    again = Follower(away, replica_dir, wall=clock)
    assert again.open() == current_generation(replica_dir)
    with pytest.raises(RegistryUnavailable):
        again.poll()
    again.close()


def generations(replica_dir: Path) -> list[Path]:
    return [path for path in replica_dir.iterdir() if path.is_dir()]


def test_a_follower_behind_the_pruned_range_copies_anew(
    follower: Follower, registry: Registry, replica_dir: Path, look: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add_device(NewDevice(identity="removed"))
    poll(follower)
    before = current_generation(replica_dir)
    monkeypatch.setattr(ledger, "_CHANGES_KEPT", 2)
    monkeypatch.setattr(ledger, "_PRUNE_EVERY", 1)
    registry.remove_device("default", "removed")
    for number in range(4):
        registry.add_device(NewDevice(identity=f"m-{number}"))
    (notice,) = poll(follower)
    assert isinstance(notice, Published)
    assert notice.sequence == 7
    assert Path(notice.path) != before
    assert generations(replica_dir) == [Path(notice.path)]
    assert sorted(look.look("removed", "m-0", "m-3").credentials) == ["m-0", "m-3"]
    registry.remove_device("default", "m-0")
    assert poll_once(follower).sequence == 8


def test_a_gap_in_the_changes_is_copied_anew(follower: Follower, registry: Registry, engine: Engine) -> None:
    """Pruned between the two reads of a poll: the row of the feed did not say it yet."""
    for number in range(3):
        registry.add_device(NewDevice(identity=f"m-{number}"))
    with engine.begin() as connection:
        connection.execute(delete(schema.changes).where(schema.changes.c.sequence <= 2))
    assert [type(notice) for notice in poll(follower)] == [Published]


def test_a_registry_that_was_set_back_is_copied_anew(
    follower: Follower, registry: Registry, engine: Engine, look: Worker
) -> None:
    registry.add_device(NewDevice(identity="later"))
    poll(follower)
    with engine.begin() as connection:
        for table in (schema.credentials, schema.devices):
            connection.execute(delete(table))
        connection.execute(delete(schema.changes).where(schema.changes.c.sequence > 1))
        connection.execute(update(schema.feed).values(sequence=1))
    assert [type(notice) for notice in poll(follower)] == [Published]
    assert look.look("later").credentials == {}


def test_another_registry_is_copied_anew(
    follower: Follower, registry: Registry, engine: Engine, replica_dir: Path, look: Worker
) -> None:
    registry.add_device(NewDevice(identity="m"))
    poll(follower)
    old = current_generation(replica_dir)
    with engine.begin() as connection:
        connection.execute(update(schema.feed).values(registry_id="another"))
        connection.execute(delete(schema.credentials))
    (notice,) = poll(follower)
    assert isinstance(notice, Published)
    assert current_generation(replica_dir) != old
    assert look.look("m").credentials == {}


def damage_truncate(generation: Path) -> None:
    data = generation / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)


def damage_overwrite(generation: Path) -> None:
    (generation / "data.mdb").write_bytes(b"not a replica" * 1000)


def damage_remove(generation: Path) -> None:
    shutil.rmtree(generation)


@pytest.mark.parametrize("damage", [damage_truncate, damage_overwrite, damage_remove])
def test_a_damaged_replica_is_rebuilt_at_the_start(
    *,
    settings: RegistrySettings,
    registry: Registry,
    replica_dir: Path,
    clock: Clock,
    look: Worker,
    damage: Callable[[Path], None],
) -> None:
    registry.add_device(NewDevice(identity="m"))
    with opened(settings, replica_dir, clock) as first:
        poll(first)
    old = current_generation(replica_dir)
    assert old is not None
    damage(old)
    again = Follower(settings, replica_dir, wall=clock)
    assert again.open() is None
    (notice,) = poll(again)
    assert isinstance(notice, Published)
    assert generations(replica_dir) == [Path(notice.path)]
    assert sorted(look.look("m").credentials) == ["m"]
    again.close()


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove])
def test_a_replica_that_is_damaged_under_a_running_follower_is_rebuilt(
    follower: Follower, replica_dir: Path, look: Worker, damage: Callable[[Path], None]
) -> None:
    old = current_generation(replica_dir)
    assert old is not None
    damage(old)
    assert [type(notice) for notice in poll(follower)] == [Published]
    assert look.look().realms == {"default": None}


def test_a_half_made_copy_is_removed(settings: RegistrySettings, replica_dir: Path, clock: Clock) -> None:
    with opened(settings, replica_dir, clock) as first:
        poll(first)
    (replica_dir / "6f1f0a52-0000-4000-8000-000000000000").mkdir()
    with opened(settings, replica_dir, clock):
        assert generations(replica_dir) == [current_generation(replica_dir)]


def test_a_copy_that_fails_leaves_the_old_one_in_use(
    follower: Follower, registry: Registry, engine: Engine, replica_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add_device(NewDevice(identity="m"))
    poll(follower)
    old = current_generation(replica_dir)

    def broken(_connection: Connection) -> Iterator[feed.Credentials]:
        raise RegistryUnavailable("gone in the middle")

    with engine.begin() as connection:
        connection.execute(update(schema.feed).values(registry_id="another"))
    with monkeypatch.context() as patch:
        patch.setattr(feed, "credential_pages", broken)
        with pytest.raises(RegistryUnavailable, match="in the middle"):
            follower.poll()
    assert generations(replica_dir) == [old]
    assert follower.progress is None
    assert [type(notice) for notice in poll(follower)] == [Published]


def test_one_folder_has_one_follower(
    follower: Follower, settings: RegistrySettings, replica_dir: Path, clock: Clock
) -> None:
    del follower
    with pytest.raises(
        ConfigurationError, match=r"in use by another gateway: give each its own node\.data_dir"
    ):
        Follower(settings, replica_dir, wall=clock).open()


def test_a_folder_that_cannot_be_made_is_named(
    settings: RegistrySettings, tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file/replica cannot be used: Not a directory"):
        Follower(settings, tmp_path / "file" / "replica", wall=clock).open()


def test_a_registry_without_tables_is_waited_for(
    url: str,
    tmp_path: Path,
    clock: Clock,
    replica_dir: Path,
    new_registry: Callable[[str, Path], RegistrySettings],
) -> None:
    engine = make_engine(url, create=True)
    engine.connect().close()
    engine.dispose()
    key = tmp_path / "k"
    with opened(RegistrySettings(url=url, master_key_file=key), replica_dir, clock) as follower:
        with pytest.raises(RegistryMismatch, match="no tables yet: run `gatewayctl migrate`"):
            follower.poll()
        new_registry(url, tmp_path)
        assert [type(notice) for notice in poll(follower)] == [Published]


# The registry is away


def test_an_sqlite_registry_that_goes_away_and_comes_back(
    tmp_path: Path,
    clock: Clock,
    replica_dir: Path,
    look: Worker,
    new_registry: Callable[[str, Path], RegistrySettings],
) -> None:
    settings = new_registry(f"sqlite:///{tmp_path}/registry.db", tmp_path)
    with opened(settings, replica_dir, clock) as follower:
        poll(follower)
        polled_at = clock.now
        (tmp_path / "registry.db").rename(tmp_path / "away.db")
        clock.now += 10
        for _ in range(2):
            with pytest.raises(RegistryUnavailable):
                follower.poll()
        assert follower.status.polled_at == polled_at
        (tmp_path / "away.db").rename(tmp_path / "registry.db")
        with Registry(settings, AUTHOR) as registry:
            registry.add_device(NewDevice(identity="m"))
        assert poll_once(follower).sequence == 2
        assert sorted(look.look("m").credentials) == ["m"]


@pytest.mark.usefixtures("_forgotten_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_stops_and_starts(
    server: DatabaseServer,
    server_settings: RegistrySettings,
    clock: Clock,
    replica_dir: Path,
    look: Worker,
) -> None:
    settings = server_settings
    with opened(settings, replica_dir, clock) as follower:
        poll(follower)
        server.stop()
        try:
            for _ in range(2):
                with pytest.raises(RegistryUnavailable, match="is away"):
                    follower.poll()
        finally:
            server.start()
        with Registry(settings, AUTHOR) as registry:
            registry.add_device(NewDevice(identity="m"))
        assert poll_once(follower).sequence == 2
        assert sorted(look.look("m").credentials) == ["m"]


def test_a_poll_that_finds_nothing_is_one_select_and_leaves_no_transaction(
    postgres_url: str,
    tmp_path: Path,
    clock: Clock,
    replica_dir: Path,
    new_registry: Callable[[str, Path], RegistrySettings],
) -> None:
    settings = new_registry(postgres_url, tmp_path)
    with opened(settings, replica_dir, clock) as follower:
        poll(follower)
        assert poll(follower) == []
        engine = make_engine(postgres_url)
        query = (
            "SELECT state, query FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        with engine.connect() as connection:
            states = connection.exec_driver_sql(query).all()
        engine.dispose()
        assert [state for state, _ in states] == ["idle"]


# The replica cannot be written


def assert_overlaid(overlay: dict[bytes, CredentialRecord | None], expected: dict[str, bool | None]) -> None:
    """The overlay names exactly these: True: enabled, False: disabled, None: gone."""
    shown = {key[8:].decode(): None if record is None else record.enabled for key, record in overlay.items()}
    assert shown == expected


def fault(follower: Follower) -> str | None:
    return follower.status.fault


def break_and_repair(
    settings: RegistrySettings,
    replica_dir: Path,
    clock: Clock,
    look: Worker,
    *,
    fill: Callable[[Follower], None],
    relieve: Callable[[Follower], None],
) -> None:
    """Changes come while the replica cannot be written: they are told with an overlay, and written afterwards."""
    with Registry(settings, AUTHOR) as registry, opened(settings, replica_dir, clock) as follower:
        for name in ("removed", "disabled", "kept"):
            registry.add_device(NewDevice(identity=name))
        poll(follower)
        ids = {device.name: device.id for device in registry.devices()}
        fill(follower)

        registry.remove_device("default", "removed")
        registry.set_device_enabled("default", "disabled", enabled=False)
        notice = poll_once(follower)
        assert notice.sequence == 6
        assert notice.devices == ((ids["removed"], ids["disabled"]),)
        assert_overlaid(notice.overlay, {"removed": None, "disabled": False})
        assert follower.overlay == notice.overlay
        assert "make room on its disk" in (fault(follower) or "")
        assert look.look("removed").sequence == 4  # the replica is as it was, and readable

        assert poll(follower) == []  # tried again, nothing new to tell

        registry.add_device(NewDevice(identity="added"))
        registry.remove_device("default", "disabled")
        notice = poll_once(follower)
        assert notice.sequence == 8
        assert_overlaid(notice.overlay, {"removed": None, "disabled": None, "added": True})
        registry.remove_device("default", "added")
        assert_overlaid(poll_once(follower).overlay, {"removed": None, "disabled": None})

        relieve(follower)
        notice = poll_once(follower)
        assert (notice.sequence, notice.overlay) == (9, {})
        assert fault(follower) is None
        assert follower.overlay == {}
        view = look.look("removed", "disabled", "kept", "added")
        assert (view.sequence, sorted(view.credentials)) == (9, ["kept"])
        assert poll(follower) == []


def test_a_full_map_keeps_the_changes(
    settings: RegistrySettings, replica_dir: Path, clock: Clock, look: Worker
) -> None:
    def reopen(follower: Follower, map_bytes: int) -> None:
        follower._map_bytes = map_bytes
        follower._close_writer()
        follower._open_writer()

    def fill_map(follower: Follower) -> None:
        generation = current_generation(replica_dir)
        assert generation is not None
        reopen(follower, (generation / "data.mdb").stat().st_size)

    break_and_repair(
        settings,
        replica_dir,
        clock,
        look,
        fill=fill_map,
        relieve=lambda follower: reopen(follower, MAP_BYTES),
    )


@pytest.fixture
def ballast(tmp_path: Path) -> Iterator[Path]:
    """A file that is to fill its file system of 2 MB."""
    with needed_small_disk(tmp_path / "small", 2 << 20) as ballast:
        yield ballast


def test_a_full_disk_keeps_the_changes(
    settings: RegistrySettings, ballast: Path, clock: Clock, worker: ProcessPoolExecutor
) -> None:
    break_and_repair(
        settings,
        ballast.with_name("replica"),
        clock,
        Worker(worker, ballast.with_name("replica")),
        fill=lambda _follower: fill(ballast),
        relieve=lambda _follower: ballast.unlink(),
    )


def test_a_first_copy_on_a_full_disk_is_tried_again(
    settings: RegistrySettings, ballast: Path, clock: Clock
) -> None:
    replica_dir = ballast.with_name("replica")
    with opened(settings, replica_dir, clock) as follower:
        fill(ballast)
        with pytest.raises(RegistryUnavailable, match=r"No space left on device.*make room on its disk"):
            follower.poll()
        assert current_generation(replica_dir) is None
        assert generations(replica_dir) == []
        ballast.unlink()
        assert [type(notice) for notice in poll(follower)] == [Published]


def test_a_restart_after_a_failed_write_reads_the_changes_again(
    settings: RegistrySettings, registry: Registry, replica_dir: Path, clock: Clock, look: Worker
) -> None:
    """The overlay is gone with the follower that had it, the change is not."""
    registry.add_device(NewDevice(identity="m"))
    with opened(settings, replica_dir, clock) as first:
        poll(first)
        generation = current_generation(replica_dir)
        assert generation is not None
        first._map_bytes = (generation / "data.mdb").stat().st_size
        first._close_writer()
        first._open_writer()
        registry.remove_device("default", "m")
        assert_overlaid(poll_once(first).overlay, {"m": None})
    with opened(settings, replica_dir, clock) as again:
        assert again.status.sequence == 2
        assert poll_once(again).overlay == {}
        assert look.look("m").credentials == {}


def test_no_key_is_in_the_replica(
    settings: RegistrySettings, registry: Registry, replica_dir: Path, clock: Clock
) -> None:
    key = registry.add_device(NewDevice(identity="m")).key
    with opened(settings, replica_dir, clock) as follower:
        poll(follower)
    files = [path for path in replica_dir.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert key.reveal() not in content
        assert key.hex().encode() not in content


# Last use, tombstones, sealed secrets


def test_a_use_reaches_the_replica_and_tells_no_worker_to_look_again(
    registry: Registry, follower: Follower, look: Worker
) -> None:
    for name in "abc":
        registry.add_device(NewDevice(identity=name))
    registry.begin_service_day()
    change = poll_once(follower)
    assert change.realms, "the day stands in the realms"
    registry.record_uses({1: utc_now(), 3: utc_now()})
    change = poll_once(follower)
    assert (change.devices, change.realms, change.overlay) == ((), False, {})
    view = look.look("a", "b", "c")
    assert {name: record.used_on for name, record in view.credentials.items()} == {"a": 1, "b": -1, "c": 1}


def test_uses_are_not_lost_when_changes_come_between(
    registry: Registry, follower: Follower, look: Worker
) -> None:
    registry.add_device(NewDevice(identity="a"))
    registry.add_device(NewDevice(identity="b"))
    poll(follower)
    registry.begin_service_day()
    registry.record_uses({1: utc_now()})
    registry.set_device_enabled("default", "b", enabled=False)
    registry.record_uses({2: utc_now()})
    poll(follower)
    view = look.look("a", "b")
    assert {name: record.used_on for name, record in view.credentials.items()} == {"a": 1, "b": 1}
    assert not view.credentials["b"].enabled


@pytest.mark.parametrize("copied", [False, True])
def test_a_removed_device_of_derived_keys_is_known_as_such(
    *,
    settings: RegistrySettings,
    registry: Registry,
    replica_dir: Path,
    clock: Clock,
    look: Worker,
    copied: bool,
) -> None:
    registry.found_realm(NewRealm(name="r", key_source="derived-hmac"))
    registry.add_device(NewDevice(identity="a", realm="r"))
    realm_id = registry.realm("r").id
    with opened(settings, replica_dir, clock) as follower:
        if not copied:
            poll(follower)
        registry.remove_device("r", "a")
        poll(follower)
        record = look.look("a", realm_id=realm_id).credentials["a"]
        assert (record.revoked, record.credential_id, record.sealed_key) == (True, 0, b"")
        registry.add_device(NewDevice(identity="a", realm="r"))
        poll(follower)
        record = look.look("a", realm_id=realm_id).credentials["a"]
        assert (record.revoked, record.credential_id) == (False, 2)
        registry.set_device_enabled("r", "a", enabled=False)
        poll(follower)
        assert look.look("a", realm_id=realm_id).credentials["a"].disabled


def test_what_is_sealed_anew_reaches_the_replica(
    settings: RegistrySettings, registry: Registry, follower: Follower, look: Worker
) -> None:
    added = registry.add_device(NewDevice(identity="a"))
    poll(follower)
    path = settings.master_key_file
    path.write_text("ab" * 32 + "\n" + path.read_text())
    with Registry(settings, AUTHOR) as resealer:
        list(resealer.reseal())
    poll(follower)
    sealer = Sealer([MasterKey.from_file(path)])
    record = look.look("a").credentials["a"]
    assert sealer.open(record.sealed_key, credential_context(1, b"a")) == added.key.reveal()
    assert follower._meta is not None
    for name, sealed in follower._meta.secrets.items():
        assert len(sealer.open(sealed, secret_context(name))) == 32


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # a file is moved away
def test_reports_wait_for_a_registry_that_is_away(
    settings: RegistrySettings, registry: Registry, clock: Clock, tmp_path: Path
) -> None:
    registry.found_realm(NewRealm(name="r", key_source="derived-hmac", enroll="first-use"))
    realm_id = registry.realm("r").id
    registry.add_device(NewDevice(identity="a"))
    registry.begin_service_day()
    reports = Reports(settings, settings.master_keys().sealer(), clock)

    def is_due() -> bool:
        return reports.is_due

    assert is_due(), "today was not counted by this process"
    assert reports.flush() == []
    assert not is_due()
    reports.add_uses({1: clock.now})
    reports.add_newcomers([Newcomer(realm_id, "n", "192.0.2.1"), Newcomer(77, "m", "192.0.2.1")])
    file = tmp_path / "registry.db"
    file.rename(tmp_path / "away.db")
    with pytest.raises(RegistryUnavailable):
        reports.flush()
    assert is_due()
    (tmp_path / "away.db").rename(file)
    clock.now += 20
    enrolled, refused = reports.flush()
    assert (enrolled.newcomer.identity, enrolled.refused) == ("n", None)
    assert (refused.newcomer.identity, refused.refused) == ("m", "realm None enrols nobody any more")
    assert not is_due()
    reports.add_newcomers([refused.newcomer])
    assert not is_due(), "what was refused is not tried again at once"
    assert registry.device("default", "a").credentials[0].last_used_at is not None
    assert reports.audit_head() == registry.audit_head()
    reports.close()
