"""A registry that is away: devices connect and stay as the replica knows them, and nobody has to do anything after."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.integration.postgresql import PostgresServer
from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

AWAY_S = 20
"""PostgreSQL's connect time-out and the follower's longest pause, and room for a busy machine."""


def connects(gateway: Gateway, device: Device) -> bool:
    try:
        TlsDevice.connect(gateway.port(), device).close()
    except Refused:
        return False
    return True


def is_degraded(gateway: Gateway) -> bool:
    status, body = gateway.http("/readyz")
    return status == 200 and "degraded" in body


@pytest.fixture
def on_postgres(tmp_path: Path, postgres_server: PostgresServer, postgres_url: str) -> Iterator[Gateway]:
    gateway = new_gateway(tmp_path / "gateway", registry_url=postgres_url)
    gateway.ctl("migrate")
    yield gateway
    postgres_server.stop()  # in whatever state the test left it
    postgres_server.start()


def test_postgresql_stopped_and_started_again(on_postgres: Gateway, postgres_server: PostgresServer) -> None:
    gateway = on_postgres
    known, gone = gateway.add_devices(NewDevice(identity="known"), NewDevice(identity="gone"))
    with running(gateway):
        with TlsDevice.connect(gateway.port(), known) as session:
            postgres_server.stop()
            wait_for(lambda: is_degraded(gateway), AWAY_S, "readiness to say that the registry is away")
            assert connects(gateway, known)
            os.kill(gateway.worker_pids()[0], signal.SIGKILL)  # a worker begins anew without the registry
            wait_for(lambda: connects(gateway, known), 10, "the new worker")
            refused = gateway.ctl("add-device", "new", check=False)
            assert refused.returncode == 1
            assert refused.stderr.startswith("error: ")
            assert len(refused.stderr.splitlines()) == 1
            postgres_server.start()
            added = gateway.add_device("new")
            gateway.ctl("remove-device", "gone")
            wait_for(lambda: connects(gateway, added), AWAY_S, "the device that was added")
            wait_for(lambda: not connects(gateway, gone), 2, "the removed device refused")
            wait_for(lambda: not is_degraded(gateway), AWAY_S, "readiness")
            session.close()
        assert gateway.metric("pskgw_registry_age_seconds") < AWAY_S


def test_a_start_without_the_registry(on_postgres: Gateway, postgres_server: PostgresServer) -> None:
    gateway = on_postgres
    (known,) = gateway.add_devices(NewDevice(identity="known"))
    with running(gateway):
        assert connects(gateway, known)
    postgres_server.stop()
    with running(gateway):  # the replica of before is there
        assert connects(gateway, known)
        assert is_degraded(gateway)
    shutil.rmtree(gateway.directory / "data" / "replica")
    try:
        gateway.start(wait=False)
        gateway.wait_for_event("admin_listening", 30)
        assert gateway.http("/readyz")[0] == 503
        assert gateway.http("/healthz")[0] == 200
        gateway.wait_for_event("registry_unusable", AWAY_S)
        postgres_server.start()
        wait_for(lambda: gateway.http("/readyz")[0] == 200, AWAY_S, "readiness once the registry is back")
        assert connects(gateway, known)
    finally:
        gateway.kill()


def test_an_sqlite_registry_moved_away_and_back(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    (known,) = gateway.add_devices(NewDevice(identity="known"))
    registry, elsewhere = gateway.directory / "registry.db", gateway.directory / "elsewhere.db"
    with running(gateway):
        registry.rename(elsewhere)
        wait_for(lambda: is_degraded(gateway), 10, "readiness to say that the registry is away")
        assert connects(gateway, known)
        elsewhere.rename(registry)
        wait_for(lambda: not is_degraded(gateway), 10, "readiness")
        added = gateway.add_device("new")
        wait_for(lambda: connects(gateway, added), 2, "the device that was added")


def test_a_replica_that_was_truncated_is_copied_anew(tmp_path: Path) -> None:
    """A reader of a truncated file may die by SIGBUS; the gateway heals by itself."""
    gateway = new_gateway(tmp_path / "gateway")
    devices = gateway.add_devices(*(NewDevice(identity=f"d-{number}") for number in range(200)))
    with running(gateway):
        assert connects(gateway, devices[0])
        (data,) = (gateway.directory / "data" / "replica").glob("*/data.mdb")
        os.truncate(data, 4096 * 3)
        wait_for(lambda: not data.exists(), 10, "the damaged generation removed")
        wait_for(lambda: gateway.http("/readyz")[0] == 200, 15, "readiness")
        wait_for(lambda: _safely_connects(gateway, devices[199]), 15, "devices again")


def _safely_connects(gateway: Gateway, device: Device) -> bool:
    try:
        return connects(gateway, device)
    except OSError:
        return False
