"""Commands that wait, from the registry to the replica and out again, on each database."""

import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from gateway.errors import RegistryRefused
from gateway.registry import schema
from gateway.registry.commands import PAYLOAD_BYTES_MAX, WAITING_PER_DEVICE_MAX
from gateway.registry.database import make_engine, read
from gateway.registry.follower import Follower
from gateway.registry.founding import initialise
from gateway.registry.ledger import Author
from gateway.registry.migrate import migrate
from gateway.registry.notices import Changed, Published
from gateway.registry.replica import ReplicaReader
from gateway.registry.sealing import MasterKey
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry
from tests.integration.postgresql import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]

AUTHOR = Author("alice", "console.example")
HOUR = dt.timedelta(hours=1)


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> RegistrySettings:
    sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path / 'registry.db'}" if sqlite else request.getfixturevalue("postgres_url")
    MasterKey.generate().write(tmp_path / "master.key")
    migrate(url)
    settings = RegistrySettings(url=url, master_key_file=tmp_path / "master.key")
    initialise(settings, AUTHOR)
    return settings


@pytest.fixture
def registry(settings: RegistrySettings) -> Iterator[Registry]:
    with Registry(settings, AUTHOR) as registry:
        yield registry


@pytest.fixture
def follower(settings: RegistrySettings, tmp_path: Path) -> Iterator[Follower]:
    follower = Follower(settings, tmp_path / "replica", wall=time.time)
    follower.open()
    yield follower
    follower.close()


def waiting(follower: Follower, device_id: int) -> list[tuple[str, bytes]]:
    """What a worker would find; LMDB opens no folder twice in one process, so it is read as the follower has it."""
    writer = follower._writer
    assert writer is not None
    reader = ReplicaReader(writer._environment, writer._tables)
    return [(command.command_id, command.payload) for command in reader.commands(device_id)]


def test_the_migration_makes_what_the_program_knows(settings: RegistrySettings) -> None:
    engine = make_engine(settings.url)
    with read(engine) as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


def test_from_the_registry_to_the_replica_and_out_again(registry: Registry, follower: Follower) -> None:
    for name in ("a", "b"):
        registry.add_device(NewDevice(identity=name))
    assert isinstance(follower.poll()[0], Published)
    ids = {name: registry.device("default", name).id for name in ("a", "b")}
    registry.queue_command("default", "a", "c1", b"one", HOUR)
    registry.queue_command("default", "a", "c2", bytes(range(256)), HOUR)
    registry.queue_command("default", "b", "c3", b"", HOUR)
    assert any(isinstance(notice, Changed) for notice in follower.poll())
    assert waiting(follower, ids["a"]) == [("c1", b"one"), ("c2", bytes(range(256)))]
    assert waiting(follower, ids["b"]) == [("c3", b"")]
    assert waiting(follower, 99) == []
    follower.remove_commands([1])
    (notice,) = follower.poll()
    assert isinstance(notice, Changed)
    assert notice.devices == ((ids["a"], ids["a"]),)
    assert waiting(follower, ids["a"]) == [("c2", bytes(range(256)))]
    follower.remove_commands([1])  # a second time, as after a crash
    assert follower.poll() == []


def test_a_full_copy_has_them(registry: Registry, follower: Follower) -> None:
    registry.add_device(NewDevice(identity="a"))
    registry.queue_command("default", "a", "c1", b"one", HOUR)
    assert isinstance(follower.poll()[0], Published)
    assert waiting(follower, registry.device("default", "a").id) == [("c1", b"one")]


def test_expired_ones_are_removed(registry: Registry, follower: Follower) -> None:
    registry.add_device(NewDevice(identity="a"))
    registry.queue_command("default", "a", "c1", b"one", dt.timedelta(milliseconds=1))
    registry.queue_command("default", "a", "c2", b"two", HOUR)
    follower.poll()
    time.sleep(0.01)
    assert follower.remove_expired_commands() == 1
    assert follower.remove_expired_commands() == 0
    follower.poll()
    assert waiting(follower, registry.device("default", "a").id) == [("c2", b"two")]


def test_a_removed_device_takes_them_along(registry: Registry, follower: Follower) -> None:
    registry.add_device(NewDevice(identity="a"))
    device_id = registry.device("default", "a").id
    registry.queue_command("default", "a", "c1", b"one", HOUR)
    follower.poll()
    registry.remove_device("default", "a")
    follower.poll()
    assert waiting(follower, device_id) == []


def test_bounds(registry: Registry) -> None:
    registry.add_device(NewDevice(identity="a"))
    with pytest.raises(RegistryRefused, match="65536 bytes"):
        registry.queue_command("default", "a", "c", bytes(PAYLOAD_BYTES_MAX + 1), HOUR)
    for number in range(WAITING_PER_DEVICE_MAX):
        registry.queue_command(
            "default", "a", f"c{number}", bytes(PAYLOAD_BYTES_MAX if number == 0 else 0), HOUR
        )
    with pytest.raises(RegistryRefused, match="100 commands wait for this device already"):
        registry.queue_command("default", "a", "c", b"", HOUR)
    with pytest.raises(RegistryRefused, match="does not exist"):
        registry.queue_command("default", "nobody", "c", b"", HOUR)
