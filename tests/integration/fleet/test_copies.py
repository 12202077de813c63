"""The whole registry is copied: the first time, and when a follower was away for too long."""

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Connection, text, update

from gateway.config import load
from gateway.registry import schema
from gateway.registry.database import make_engine, write
from gateway.registry.ledger import note_change, utc_now
from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.psk_device import Session, is_accepted

COPIED_WITHIN_S = 300


@pytest.fixture
def gateway(postgres_url: str, tmp_path: Path) -> Gateway:
    gateway = new_gateway(tmp_path / "gateway", registry_url=postgres_url)
    gateway.ctl("migrate")
    return gateway


def change_registry(gateway: Gateway, work: Callable[[Connection], object]) -> None:
    engine = make_engine(load(gateway.config).registry.url)
    write(engine, work)
    engine.dispose()


DEVICES = """
    INSERT INTO devices (realm_id, name, group_name, labels, networks, disabled, created_at)
    SELECT 1, 'meter-' || n, 'meters', '{"site":"north"}', '[]', false, now() FROM generate_series(1, :count) n
"""
CREDENTIALS = """
    INSERT INTO credentials (device_id, realm_id, identity, sealed_key, fingerprint, hash, created_at)
    SELECT id, 1, name, decode(repeat('5a', 69), 'hex'), decode(md5(name), 'hex'), 'sha256', now()
    FROM devices WHERE group_name = 'meters'
"""


def fill(connection: Connection, count: int) -> None:
    """Devices with a credential each, whose keys are as long as sealed ones and open to nobody."""
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    connection.execute(text(DEVICES), {"count": count})
    connection.execute(text(CREDENTIALS))
    note_change(connection, "device", 1, count + 1, utc_now())


@pytest.mark.parametrize(
    "devices", [100_000, pytest.param(1_000_000, marks=[pytest.mark.prove, pytest.mark.timeout(900)])]
)
def test_the_first_copy_shows_how_far_it_is(
    gateway: Gateway, devices: int, measured: Callable[[str], None]
) -> None:
    device = gateway.add_device("the-one")
    change_registry(gateway, lambda connection: fill(connection, devices))
    said = set()
    with running(gateway, wait=False):
        gateway.wait_for_event("started")
        began = time.monotonic()
        status = 0
        while status != 200:
            assert time.monotonic() - began < COPIED_WITHIN_S
            status, body = gateway.http("/readyz")
            said.update(json.loads(body).get("reasons", []))
            time.sleep(0.05)
        took_s = time.monotonic() - began
        follower = psutil.Process(gateway.follower_pid())
        cpu, peak = follower.cpu_times(), _peak_bytes(follower.pid)
        measured(
            f"{devices:,} credentials copied from PostgreSQL: ready after {took_s:.1f} s, "
            f"{cpu.user + cpu.system:.1f} CPU s and {peak / 1e6:.0f} MB at most in the follower"
        )
        assert any(f" of {devices + 1:,} credentials" in reason for reason in said), said
        assert gateway.wait_for_event("replica_copying")["progress"].endswith(f"{devices + 1:,} credentials")
        assert is_accepted(gateway.port(), device.identity, device.key)
        late = gateway.add_device("late")
        wait_for(functools.partial(is_accepted, gateway.port(), late.identity, late.key), 10)
        assert gateway.complaints() == []


def _peak_bytes(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


def test_a_follower_that_was_away_for_too_long_copies_anew_and_looks_at_live_sessions(
    gateway: Gateway,
) -> None:
    kept, revoked = gateway.add_device("kept"), gateway.add_device("revoked")

    def prune(connection: Connection) -> None:
        note_change(connection, "realm", 0, 0, utc_now())
        connection.execute(update(schema.feed).values(pruned_through=schema.feed.c.sequence))
        connection.execute(schema.changes.delete())

    with running(gateway):
        port = gateway.port()
        with (
            Session(port, kept.identity, kept.key) as stays,
            Session(port, revoked.identity, revoked.key) as goes,
        ):
            assert stays.ask(b"a") == goes.ask(b"b") == b"ok 1"
            os.kill(gateway.follower_pid(), signal.SIGSTOP)
            try:
                gateway.ctl("revoke-key", "revoked")
                change_registry(gateway, prune)
                assert is_accepted(port, kept.identity, kept.key)
            finally:
                os.kill(gateway.follower_pid(), signal.SIGCONT)
            goes.wait_until_ended(10)
            assert not is_accepted(port, revoked.identity, revoked.key)
            assert is_accepted(port, kept.identity, kept.key)
            assert stays.ask(b"c") == b"ok 2"
        assert len(gateway.events("replica_published")) == 2
        assert gateway.complaints() == []
