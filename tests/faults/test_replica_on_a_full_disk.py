"""A node's disk is full: what was revoked stays so, whatever of the gateway dies and whether the registry is there or not."""

import contextlib
import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.capabilities import fill, needed_small_disk
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.psk_device import Session, is_accepted

DISK_BYTES = 4 << 20
SQLITE_FILES = ("registry.db", "registry.db-wal", "registry.db-shm")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """With a disk of its own for what a node keeps; the registry is elsewhere."""
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2", limits="penalty_max_s = 0\n")
    with needed_small_disk(gateway.directory / "data", DISK_BYTES):
        yield gateway


def move(source: Path, target: Path) -> None:
    for name in SQLITE_FILES:
        with contextlib.suppress(FileNotFoundError):
            (source / name).rename(target / name)


def kill_and_wait(gateway: Gateway, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in gateway.pids(), what="the process is gone")


def check(gateway: Gateway, kept: Device, revoked: Device) -> None:
    """Several times, since each worker has its own memory."""
    wait_for(functools.partial(_accepts, gateway, kept), 20, "devices are served")
    for _ in range(10):
        assert _accepts(gateway, kept)
        assert not _accepts(gateway, revoked)


def _accepts(gateway: Gateway, device: Device) -> bool:
    with contextlib.suppress(ConnectionError):
        return is_accepted(gateway.port(), device.identity, device.key)
    return False


def test_a_revocation_that_was_seen_is_not_forgotten(gateway: Gateway) -> None:
    kept, revoked = gateway.add_device("kept"), gateway.add_device("revoked")
    data, aside = gateway.directory / "data", gateway.directory / "aside"
    aside.mkdir()
    with running(gateway):
        with Session(gateway.port(), revoked.identity, revoked.key) as session:
            assert session.ask(b"hello") == b"ok 1"
            ballast = data / "ballast"
            fill(ballast)
            gateway.ctl("revoke-key", "revoked")
            session.wait_until_ended(10)
        assert "kept in memory" in gateway.http("/readyz")[1]
        assert "No space left" in gateway.wait_for_event("replica_unwritable")["reason"]
        check(gateway, kept, revoked)

        move(gateway.directory, aside)
        gateway.wait_for_event("registry_unusable", state="away")
        kill_and_wait(gateway, gateway.follower_pid())
        wait_for(lambda: len(gateway.events("replica_published")) == 2, 20, "a follower with an old replica")
        check(gateway, kept, revoked)
        for pid in gateway.worker_pids():
            kill_and_wait(gateway, pid)
        check(gateway, kept, revoked)

        move(aside, gateway.directory)
        ballast.unlink()
        wait_for(lambda: "kept in memory" not in gateway.http("/readyz")[1], 20, "the replica is written")
        assert gateway.stop() == 0
        move(gateway.directory, aside)
        gateway.start(wait=False)
        check(gateway, kept, revoked)
