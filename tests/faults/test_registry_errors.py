"""A PostgreSQL that is there and does not do what it should: it answers errors, is read-only, its disk is full."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from gateway.errors import RegistryError
from gateway.registry.store import NewDevice
from tests.integration.postgresql import PostgresServer
from tests.support.capabilities import fill, needed_small_disk
from tests.support.devices import TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

NOTICED_S = 20
DISK_BYTES = 48 << 20


def make_gateway(directory: Path, url: str) -> Gateway:
    gateway = new_gateway(directory, registry_url=url, node="workers = 2")
    gateway.ctl("migrate")
    return gateway


def execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(sa.text(statement))
    finally:
        engine.dispose()


def use(gateway: Gateway, device: Device) -> float:
    """A device connects and is answered; how long it took."""
    began = time.monotonic()
    with TlsDevice.connect(gateway.port(), device) as connection:
        connection.send(b"line\n")
        assert connection.receive_line() == "ok 1"
    return time.monotonic() - began


def use_often(gateway: Gateway, device: Device) -> float:
    """The slowest of some connections."""
    return max(use(gateway, device) for _ in range(50))


def check_refused(gateway: Gateway, *command: str) -> str:
    done = gateway.ctl(*command, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def check_recovered(gateway: Gateway) -> float:
    """What is new counts again; how long it took."""
    began = time.monotonic()
    late = gateway.add_device("late")
    gateway.wait_until_followed()
    use(gateway, late)
    wait_for(lambda: gateway.http("/readyz") == (200, '{"status": "ready"}'), NOTICED_S, "ready")
    assert gateway.metric("pskgw_process_restarts_total") == 0
    return time.monotonic() - began


def test_it_answers_errors(tmp_path: Path, postgres_url: str, measured: Callable[[str], None]) -> None:
    gateway = make_gateway(tmp_path / "gateway", postgres_url)
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        use(gateway, device)
        execute(postgres_url, "ALTER TABLE feed RENAME TO feed_away")
        wait_for(lambda: "degraded" in gateway.http("/readyz")[1], NOTICED_S, "/readyz tells")
        check_refused(gateway, "add-device", "one-more")
        slowest_s = use_often(gateway, device)
        execute(postgres_url, "ALTER TABLE feed_away RENAME TO feed")
        recovered_s = check_recovered(gateway)
    measured(
        f"every query fails: slowest of 50 connections {slowest_s:.2f} s, recovered in {recovered_s:.1f} s"
    )
    assert slowest_s < 1


def test_it_is_read_only(
    tmp_path: Path, postgres_server: PostgresServer, postgres_url: str, measured: Callable[[str], None]
) -> None:
    gateway = make_gateway(tmp_path / "gateway", postgres_url)
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    database = sa.engine.make_url(postgres_url).database
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    with running(gateway):
        postgres_server.administer(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        postgres_server.administer(cut)
        assert "read-only" in check_refused(gateway, "add-device", "one-more")
        slowest_s = use_often(gateway, device)  # their last use cannot be written
        wait_for(lambda: gateway.http("/readyz")[0] == 200, what="it serves")
        assert gateway.metric("pskgw_process_restarts_total") == 0
        postgres_server.administer(f"ALTER DATABASE {database} RESET default_transaction_read_only")
        postgres_server.administer(cut)
        recovered_s = check_recovered(gateway)
    measured(f"read-only: slowest of 50 connections {slowest_s:.2f} s, recovered in {recovered_s:.1f} s")
    assert slowest_s < 1


@pytest.fixture
def small_database(postgres_server: PostgresServer) -> Iterator[tuple[str, Path]]:
    """A database on a disk of its own, and the file that is to fill that."""
    folder = Path(tempfile.mkdtemp(prefix="pskgw-tablespace-"))
    folder.chmod(0o755)
    disk = folder / "disk"
    try:
        with needed_small_disk(disk, DISK_BYTES) as ballast:
            space = disk / "space"
            space.mkdir(mode=0o700)
            if postgres_server.account_used is not None:
                shutil.chown(space, postgres_server.account_used)
            postgres_server.administer(f"CREATE TABLESPACE small LOCATION '{space}'")
            name = postgres_server.create_database()
            postgres_server.administer(f"ALTER DATABASE {name} SET TABLESPACE small")
            yield postgres_server.url(name), ballast
            postgres_server.drop_database(name)
            postgres_server.administer("DROP TABLESPACE small")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add_many(gateway: Gateway, count: int) -> None:
    with gateway.registry() as registry:
        for number in range(count):
            registry.add_device(NewDevice(identity=f"more-{number}"))


def test_its_disk_is_full(
    tmp_path: Path, small_database: tuple[str, Path], measured: Callable[[str], None]
) -> None:
    url, ballast = small_database
    gateway = make_gateway(tmp_path / "gateway", url)
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        fill(ballast)
        with pytest.raises(RegistryError) as full:
            add_many(gateway, 5000)  # until no page has room
        check_refused(gateway, "add-device", "one-more")
        slowest_s = use_often(gateway, device)
        ballast.unlink()
        recovered_s = check_recovered(gateway)
    measured(
        f"disk full ({str(full.value).rpartition(': ')[2]}): slowest of 50 connections {slowest_s:.2f} s, recovered in {recovered_s:.1f} s"
    )
    assert slowest_s < 1
