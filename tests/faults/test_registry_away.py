"""The registry, or the replica of it, goes away under a running gateway: devices do not notice, and it heals by itself."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.store import NewDevice
from tests.integration.postgresql import PostgresServer
from tests.support.database_server import DatabaseServer, database_of
from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

AWAY_S = 20
"""The connect time-out, the follower's longest pause, and room for a busy machine."""
SQLITE_FILES = ("registry.db", "registry.db-wal", "registry.db-shm")


@pytest.fixture
def sqlite_gateway(tmp_path: Path) -> Gateway:
    return new_gateway(tmp_path / "gateway", node="workers = 2")


@pytest.fixture
def postgres_gateway(tmp_path: Path, postgres_url: str) -> Gateway:
    gateway = new_gateway(tmp_path / "gateway", registry_url=postgres_url)
    gateway.ctl("migrate")
    return gateway


@contextlib.contextmanager
def stopped(server: DatabaseServer) -> Iterator[None]:
    """Without a database server."""
    server.stop()
    try:
        yield
    finally:
        server.start()


def use(gateway: Gateway, device: Device) -> None:
    """A device connects and sends a line."""
    with TlsDevice.connect(gateway.port(), device) as connection:
        connection.send(b"line\n")
        assert connection.receive_line() == "ok 1"


def readiness(gateway: Gateway) -> tuple[int, dict[str, Any]]:
    status, body = gateway.http("/readyz")
    return status, json.loads(body)


def is_degraded_by_the_registry(gateway: Gateway) -> bool:
    status, body = readiness(gateway)
    return (
        status == 200 and body["status"] == "degraded" and any("registry" in why for why in body["reasons"])
    )


def check_degraded_and_serving(gateway: Gateway, device: Device) -> None:
    """Devices connect, whatever the registry does; operators are told."""
    wait_for(lambda: is_degraded_by_the_registry(gateway), AWAY_S, "/readyz says what is away")
    gateway.wait_for_event("registry_unusable", state="away")
    use(gateway, device)
    age = gateway.metric("pskgw_registry_age_seconds")
    wait_for(lambda: gateway.metric("pskgw_registry_age_seconds") > age, what="the age grows")


def check_recovered(gateway: Gateway, *, complaints: int = 0) -> None:
    """It follows again, and what is new counts."""
    wait_for(lambda: readiness(gateway) == (200, {"status": "ready"}), AWAY_S, "/readyz says ready")
    gateway.wait_for_event("registry_back")
    (late,) = gateway.add_devices(NewDevice(identity="late"))
    gateway.wait_until_followed()
    use(gateway, late)
    assert len(gateway.complaints()) == complaints


def test_the_sqlite_file_is_moved_away_and_back(sqlite_gateway: Gateway) -> None:
    gateway = sqlite_gateway
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    aside = gateway.directory / "aside"
    aside.mkdir()
    with running(gateway):
        use(gateway, device)
        _move(gateway.directory, aside)
        check_degraded_and_serving(gateway, device)
        done = gateway.ctl("list-devices", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "registry.db" in done.stderr
        assert not (gateway.directory / "registry.db").exists()
        _move(aside, gateway.directory)
        check_recovered(gateway)


def test_a_restored_backup_is_taken_as_it_is(sqlite_gateway: Gateway) -> None:
    """A registry that is older than what the replica has: what the backup does not know is cut off."""
    gateway = sqlite_gateway
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    backup = gateway.directory / "backup"
    backup.mkdir()
    for name in SQLITE_FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(gateway.directory / name, backup / name)
    with running(gateway):
        (newer,) = gateway.add_devices(NewDevice(identity="newer"))
        gateway.wait_until_followed()
        with TlsDevice.connect(gateway.port(), newer) as connection:
            connection.send(b"line\n")
            assert connection.receive_line() == "ok 1"
            aside = gateway.directory / "aside"
            aside.mkdir()
            _move(gateway.directory, aside)
            _move(backup, gateway.directory)
            assert connection.receive_to_end() == b""
        use(gateway, device)
        with pytest.raises(Refused):
            use(gateway, newer)


def _move(source: Path, target: Path) -> None:
    for name in SQLITE_FILES:
        with contextlib.suppress(FileNotFoundError):
            (source / name).rename(target / name)


@pytest.mark.parametrize("server", ["postgres_server", "mariadb_server"], indirect=True)
def test_a_database_server_stops_and_starts(server: DatabaseServer, tmp_path: Path) -> None:
    with database_of(server) as url:
        gateway = new_gateway(tmp_path / "gateway", registry_url=url)
        gateway.ctl("migrate")
        check_outage(gateway, server)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> DatabaseServer:
    server = request.getfixturevalue(request.param)
    assert isinstance(server, DatabaseServer)
    return server


def check_outage(gateway: Gateway, server: DatabaseServer) -> None:
    device, gone = gateway.add_devices(NewDevice(identity="d"), NewDevice(identity="gone"))
    with running(gateway):
        use(gateway, device)
        with stopped(server):
            check_degraded_and_serving(gateway, device)
            os.kill(gateway.worker_pids()[0], signal.SIGKILL)
            wait_for(lambda: _works(gateway, device), what="a worker that began without the registry")
            done = gateway.ctl("add-device", "nobody", check=False)
            assert done.returncode == 1
            assert re.fullmatch(r"error: the registry [a-z]+\+[a-z]+://.* is away: .*\n", done.stderr)
        gateway.wait_for_event("registry_back")
        with gateway.registry() as registry:
            registry.remove_device("default", "gone")
        gateway.wait_until_followed()
        with pytest.raises(Refused):
            use(gateway, gone)
        check_recovered(gateway, complaints=1)  # of the worker


def test_a_gateway_starts_without_postgresql(
    postgres_gateway: Gateway, postgres_server: PostgresServer
) -> None:
    """On the replica that it has; without one it waits, says so, and serves once the registry is there."""
    gateway = postgres_gateway
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        use(gateway, device)
        assert gateway.stop() == 0
        with stopped(postgres_server):
            gateway.start()
            check_degraded_and_serving(gateway, device)
            gateway.wait_for_event("registry_away")
            assert gateway.stop() == 0

            shutil.rmtree(gateway.directory / "data" / "replica")
            gateway.start(wait=False)
            gateway.wait_for_event("registry_unusable", state="away")
            status, body = readiness(gateway)
            assert status == 503
            assert body["status"] == "not ready"
            assert "never copied" in body["reasons"][0]
            assert "away" in body["reasons"][0]
            assert gateway.http("/healthz")[0] == 200
            age_s = gateway.metric("pskgw_registry_age_seconds")
            wait_for(
                lambda: gateway.metric("pskgw_registry_age_seconds") > age_s, what="it is older and older"
            )
        check_recovered(gateway)
        use(gateway, device)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied", "overwritten"])
def test_a_damaged_replica_heals(
    sqlite_gateway: Gateway, damage: str, measured: Callable[[str], None]
) -> None:
    gateway = sqlite_gateway
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        use(gateway, device)
        (generation,) = (path for path in (gateway.directory / "data" / "replica").iterdir() if path.is_dir())
        data = generation / "data.mdb"
        size = data.stat().st_size
        match damage:
            case "deleted":
                shutil.rmtree(generation)
            case "truncated":
                os.truncate(data, size // 2)
            case "emptied":
                os.truncate(data, 0)
            case _:
                data.write_bytes(os.urandom(size))
        began = time.monotonic()
        # A truncated file kills those that read it; so does a new one, and that heals it at the latest.
        (late,) = gateway.add_devices(NewDevice(identity="late"))
        wait_for(lambda: _works(gateway, late), 20, "the running gateway healed")
        use(gateway, device)
        measured(
            f"replica {damage}: healed {time.monotonic() - began:.1f} s after a change, "
            f"{gateway.metric('pskgw_process_restarts_total'):.0f} processes replaced"
        )


def test_a_gateway_starts_whatever_became_of_its_replica(sqlite_gateway: Gateway) -> None:
    gateway = sqlite_gateway
    replica = gateway.directory / "data" / "replica"
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        for damage in ("truncated", "overwritten", "other files"):
            use(gateway, device)
            assert gateway.stop() == 0
            (generation,) = (path for path in replica.iterdir() if path.is_dir())
            data = generation / "data.mdb"
            match damage:
                case "truncated":
                    os.truncate(data, data.stat().st_size // 2)
                case "overwritten":
                    data.write_bytes(os.urandom(data.stat().st_size))
                case _:
                    (replica / "current").write_text("../../etc\n")
                    (replica / "stray").write_text("what is this?\n")
            gateway.start()
        use(gateway, device)
        assert gateway.complaints() == []


def _works(gateway: Gateway, device: Device) -> bool:
    try:
        use(gateway, device)
    except (Refused, ConnectionError):
        return False
    return True


def test_past_max_staleness_nobody_new_is_let_in(tmp_path: Path) -> None:
    """Over a restart of the node, too; live sessions stay, and it heals by itself."""
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2", registry="max_staleness_s = 3")
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    aside = gateway.directory / "aside"
    aside.mkdir()

    def is_stale() -> bool:
        status, body = readiness(gateway)
        return status == 503 and "max_staleness_s" in body["reasons"][0]

    def check_refused() -> None:
        with pytest.raises(Refused) as refusal:
            use(gateway, device)
        with pytest.raises(Refused) as wrong:
            use(gateway, Device("d", "00" * 32))
        assert refusal.value.args == wrong.value.args, "it looks like a wrong key"
        gateway.wait_for_event("handshake_failed", outcome="registry_stale")

    with running(gateway):
        with TlsDevice.connect(gateway.port(), device) as live:
            live.send(b"line\n")
            assert live.receive_line() == "ok 1"
            _move(gateway.directory, aside)
            use(gateway, device)
            wait_for(is_stale, AWAY_S, "/readyz says that it is stale")
            check_refused()
            assert gateway.metric("pskgw_handshakes_total", outcome="registry_stale") == 2
            live.send(b"line\n")
            assert live.receive_line() == "ok 2"
        assert gateway.stop() == 0
        gateway.start(wait=False)
        wait_for(is_stale, AWAY_S, "/readyz says that it is stale")
        check_refused()
        _move(aside, gateway.directory)
        wait_for(lambda: _works(gateway, device), AWAY_S, "it was read again")
        check_recovered(gateway)
