"""One registry per test, on every database that the project supports and this machine has."""

import datetime as dt
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine

from gateway.registry.database import make_engine
from gateway.registry.founding import initialise
from gateway.registry.ledger import Author
from gateway.registry.migrate import migrate
from gateway.registry.sealing import MasterKey
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry
from tests.support.database_server import DatabaseServer, database_of

AUTHOR = Author("alice", "console.example")
NOON = dt.datetime(2030, 1, 2, 12, 0, 0, 123456, tzinfo=dt.UTC)


SERVERS = {"postgresql": "postgres_server", "mariadb": "mariadb_server"}


@pytest.fixture(params=["sqlite", *SERVERS])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where an empty database is, or can be made."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'registry.db'}"
        return
    with database_of(request.getfixturevalue(SERVERS[request.param])) as url:
        yield url


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> DatabaseServer:
    """A database server: what SQLite cannot show is shown on each of them."""
    server = request.getfixturevalue(SERVERS[request.param])
    assert isinstance(server, DatabaseServer)
    return server


@pytest.fixture
def _forgotten_sockets() -> Iterator[None]:
    """PyMySQL leaves a socket that did not connect to the garbage collector: let it warn in this test, not in a later one."""
    yield
    gc.collect()


@pytest.fixture
def server_settings(server: DatabaseServer, tmp_path: Path) -> Iterator[RegistrySettings]:
    """A registry on it."""
    with database_of(server) as url:
        yield found_registry(url, tmp_path)


@pytest.fixture
def settings(url: str, tmp_path: Path) -> RegistrySettings:
    """A registry that was migrated and founded."""
    return found_registry(url, tmp_path)


@pytest.fixture
def registry(settings: RegistrySettings) -> Iterator[Registry]:
    with Registry(settings, AUTHOR, now=lambda: NOON) as registry:
        yield registry


@pytest.fixture
def engine(settings: RegistrySettings) -> Iterator[Engine]:
    engine = make_engine(settings.url)
    yield engine
    engine.dispose()


@pytest.fixture
def new_registry() -> Callable[[str, Path], RegistrySettings]:
    return found_registry


def found_registry(url: str, folder: Path) -> RegistrySettings:
    master_key_file = folder / "master.key"
    MasterKey.generate().write(master_key_file)
    settings = RegistrySettings(url=url, master_key_file=master_key_file)
    migrate(settings.url)
    assert initialise(settings, AUTHOR, now=lambda: NOON)
    return settings


@pytest.fixture
def worker() -> Iterator[ProcessPoolExecutor]:
    """Another process, to look into a replica with the functions of `lookups`; a test may cost its life."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
