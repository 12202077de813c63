"""Spooled routes with real processes: killed, without a backend, without a disk. Nothing acknowledged is lost."""

import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.forward.delivery import BATCH_MESSAGES_MAX
from tests.support.capabilities import fill, needed_small_disk
from tests.support.fleet import Fleet, Verdict, judge
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

ROUTE = """
[[routes]]
name = "readings"
framing = "lines"
delivery = "spooled"
content_type = "text/plain"
backend = "events"
"""
DELIVERED_S = 30
ROOM_TO_OPEN_BYTES = 128 << 10


def spooled_gateway(directory: Path, spool: str = "", **pieces: Any) -> Gateway:
    return new_gateway(directory, routes=f"{ROUTE}[routes.spool]\n{spool}\n", **pieces)


def devices(gateway: Gateway, count: int) -> list[Device]:
    return [gateway.add_device(f"d{number}") for number in range(count)]


def port_of(gateway: Gateway) -> int | None:
    found = [entry for entry in gateway.events("listening") if entry["listener"] == "tls"]
    return int(found[-1]["address"].rpartition(":")[2]) if found else None


def all_delivered(gateway: Gateway) -> bool:
    return gateway.metric("pskgw_outbox_messages") == 0


def verdict(gateway: Gateway, fleet: Fleet) -> Verdict:
    deadline = time.monotonic() + DELIVERED_S
    while judge(fleet.acknowledged, gateway.output_events()).missing and time.monotonic() < deadline:
        time.sleep(0.1)
    wait_for(lambda: all_delivered(gateway), DELIVERED_S, "the spool is empty")
    found = judge(fleet.acknowledged, gateway.output_events()).check()
    print(
        f"{found.acknowledged} acknowledged, {found.delivered} delivered, {found.duplicates} duplicates, {fleet.errors}"
    )
    return found


class Outage:
    """The file of the backend cannot be opened while a folder is in its place."""

    def __init__(self, gateway: Gateway) -> None:
        self._path = gateway.directory / "events.jsonl"
        self._aside = gateway.directory / "events.aside"

    def begin(self) -> None:
        self._path.touch()
        self._path.rename(self._aside)
        self._path.mkdir()

    def end(self) -> None:
        self._path.rmdir()
        self._aside.rename(self._path)


def killed(
    directory: Path, times: int, *, workers: int, asyncio_only: bool = False, sync: str = "full"
) -> None:
    gateway = spooled_gateway(
        directory, f'sync = "{sync}"', node=f"workers = {workers}", asyncio_only=asyncio_only
    )
    fleet_devices = devices(gateway, 8)
    with running(gateway), Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
        for _ in range(times):
            fleet.wait_for_acknowledged(500)
            time.sleep(random.uniform(0, 0.5))
            gateway.lose()
            gateway.start()
        fleet.wait_for_acknowledged(500)
        fleet.__exit__()
        found = verdict(gateway, fleet)
    # What is sent twice at most: the batch that was out and those that were confirmed within the delay of deletions.
    assert found.duplicates <= times * workers * 20 * BATCH_MESSAGES_MAX
    print(f"{times} kills: {found.duplicates / times:.0f} duplicates each")


@pytest.mark.parametrize("asyncio_only", [False, True], ids=["uvloop", "asyncio"])
def test_killed_under_load(tmp_path: Path, asyncio_only: bool) -> None:
    killed(tmp_path / "g", 3, workers=2, asyncio_only=asyncio_only)


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sync", ["full", "normal"])
def test_killed_under_load_often(tmp_path: Path, sync: str) -> None:
    killed(tmp_path / "g", 50, workers=2, sync=sync)


def interrupted(directory: Path, rounds: int, outage_s: float) -> None:
    gateway = spooled_gateway(directory)
    fleet_devices = devices(gateway, 4)
    outage = Outage(gateway)
    with running(gateway):
        with Fleet(lambda: port_of(gateway), fleet_devices, rate=250) as fleet:
            for _ in range(rounds):
                outage.begin()
                fleet.wait_for_acknowledged(100)
                time.sleep(outage_s)
                assert gateway.metric("pskgw_outbox_oldest_seconds") > outage_s / 2
                outage.end()
                fleet.wait_for_acknowledged(100)
                wait_for(
                    lambda: gateway.metric("pskgw_outbox_oldest_seconds") < 1,
                    DELIVERED_S,
                    "the spool is drained",
                )
        found = verdict(gateway, fleet)
        assert not fleet.errors
    assert not found.duplicates  # a batch is in the file as a whole or not at all


def test_backend_away_under_load(tmp_path: Path) -> None:
    interrupted(tmp_path / "g", 2, 2.5)


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_backend_away_for_long(tmp_path: Path) -> None:
    interrupted(tmp_path / "g", 2, 120)


def test_backend_away_and_killed(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g")
    fleet_devices = devices(gateway, 4)
    outage = Outage(gateway)
    with running(gateway):
        with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
            fleet.wait_for_acknowledged(100)
            outage.begin()
            for _ in range(2):
                fleet.wait_for_acknowledged(2000)
                gateway.lose()
                gateway.start()
            outage.end()
            fleet.wait_for_acknowledged(100)
        verdict(gateway, fleet)


def test_disk_under_the_backend_full(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g")
    fleet_devices = devices(gateway, 4)
    small = tmp_path / "small"
    with needed_small_disk(small, 1 << 20):
        path = small / "events.jsonl"
        gateway.config.write_text(
            gateway.config.read_text().replace('path = "events.jsonl"', f'path = "{path}"')
        )
        with running(gateway):
            with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
                wait_for(lambda: gateway.events("backend_away"), 30, "the disk is full")
                fleet.wait_for_acknowledged(500)
                subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
                fleet.wait_for_acknowledged(500)
            wait_for(lambda: all_delivered(gateway), DELIVERED_S, "the spool is empty")
        events = [json.loads(line) for line in (small / "events.jsonl").read_bytes().splitlines()]
    found = judge(fleet.acknowledged, events).check()
    assert not found.duplicates
    assert not fleet.errors


def test_disk_under_the_spool_full(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g")
    fleet_devices = devices(gateway, 4)
    outage = Outage(gateway)
    with needed_small_disk(tmp_path / "g" / "data" / "spool", 3 << 20), running(gateway):
        with Fleet(lambda: port_of(gateway), fleet_devices, size=400) as fleet:
            for _ in range(2):
                fleet.wait_for_acknowledged(100)
                outage.begin()
                refused = fleet.errors["full"]
                wait_for(lambda: fleet.errors["full"] > refused + 100, 60, "the disk is full")  # noqa: B023 - waited for here
                assert gateway.http("/healthz")[0] == 200
                outage.end()
                fleet.wait_for_acknowledged(2000)
        verdict(gateway, fleet)
        assert set(fleet.errors) == {"full"}
        assert gateway.events("spool_disk_full")


def test_full_spool_refuses_and_goes_on(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g", "bytes_max = 1048576\ndevice_share = 0.5")
    fleet_devices = devices(gateway, 4)
    outage = Outage(gateway)
    with running(gateway):
        with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
            outage.begin()
            wait_for(lambda: fleet.errors["full"] > 1000, 30, "the spool is full")
            assert gateway.metric("pskgw_outbox_bytes") <= 1 << 20
            assert gateway.metric("pskgw_messages_rejected_total", reason="full") > 0
            outage.end()
            fleet.wait_for_acknowledged(2000)
        verdict(gateway, fleet)
        assert set(fleet.errors) == {"full"}


def test_one_device_cannot_fill_it_for_all(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g", "bytes_max = 1048576")
    wild, tame = devices(gateway, 2)
    outage = Outage(gateway)
    with running(gateway):
        outage.begin()
        with Fleet(lambda: port_of(gateway), [wild]) as running_wild:
            wait_for(lambda: running_wild.errors["full"] > 100, 30, "the share is used up")
        with Fleet(lambda: port_of(gateway), [tame], rate=50) as running_tame:
            running_tame.wait_for_acknowledged(50)
        assert not running_tame.errors
        outage.end()
        wait_for(lambda: all_delivered(gateway), DELIVERED_S, "the spool is empty")
        judge(running_wild.acknowledged | running_tame.acknowledged, gateway.output_events()).check()


def test_a_killed_workers_spool_is_taken_over(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g", node="workers = 2")
    fleet_devices = devices(gateway, 8)
    outage = Outage(gateway)
    with running(gateway):
        with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
            fleet.wait_for_acknowledged(500)
            outage.begin()
            fleet.wait_for_acknowledged(500)
            victim = gateway.worker_pids()[0]
            # Stopped first: what it holds is not delivered by itself when the backend is back.
            os.kill(victim, signal.SIGSTOP)
            os.kill(victim, signal.SIGKILL)
            outage.end()
            fleet.wait_for_acknowledged(500)
        verdict(gateway, fleet)
        spools = tmp_path / "g" / "data" / "spool" / "readings"
        wait_for(lambda: len(list(spools.glob("*.db"))) == 2, 10, "one spool for each worker")


def test_fewer_workers_deliver_what_more_have_left(tmp_path: Path) -> None:
    gateway = spooled_gateway(tmp_path / "g", node="workers = 3")
    fleet_devices = devices(gateway, 12)
    outage = Outage(gateway)
    spools = tmp_path / "g" / "data" / "spool" / "readings"
    with running(gateway):
        outage.begin()
        with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
            fleet.wait_for_acknowledged(2000)
        assert gateway.stop() == 0
        assert len(list(spools.glob("*.db"))) == 3
        outage.end()
        gateway.config.write_text(re.sub("workers = 3", "workers = 1", gateway.config.read_text()))
        gateway.start()
        wait_for(lambda: len(list(spools.glob("*.db"))) == 1, DELIVERED_S, "the others are removed")
        verdict(gateway, fleet)
        assert len(gateway.events("spool_adopted")) == 2


@pytest.mark.parametrize("damage", ["head", "middle", "row"])
def test_a_damaged_spool_is_put_aside_and_saved_from(tmp_path: Path, damage: str) -> None:
    gateway = spooled_gateway(tmp_path / "g")
    fleet_devices = devices(gateway, 2)
    outage = Outage(gateway)
    with running(gateway):
        outage.begin()
        with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
            fleet.wait_for_acknowledged(5000)
        assert gateway.stop() == 0
        outage.end()
        (spool,) = (tmp_path / "g" / "data" / "spool" / "readings").glob("*.db")
        if damage == "row":
            with contextlib.closing(sqlite3.connect(spool)) as connection, connection:
                connection.execute(
                    "UPDATE groups SET checksum = checksum + 1 WHERE number = (SELECT min(number) + 1 FROM groups)"
                )
        else:
            with spool.open("r+b") as file:
                file.seek(0 if damage == "head" else spool.stat().st_size // 2)
                file.write(os.urandom(4096))
        gateway.start()
        with Fleet(lambda: port_of(gateway), fleet_devices) as later:
            later.wait_for_acknowledged(100)
        wait_for(lambda: all_delivered(gateway), DELIVERED_S, "the spool is empty")
        saved = judge(fleet.acknowledged, [])
        arrived = len(gateway.output_events())
        if damage == "head":
            assert gateway.events("spool_damaged")
            assert list(spool.parent.glob("*.damaged"))
        else:
            lost = len(fleet.acknowledged) + len(later.acknowledged) - arrived
            print(f"{lost} of {saved.acknowledged} lost with one page")
            assert 0 <= lost <= 2 * BATCH_MESSAGES_MAX


def damage_in_the_middle_of_a_row(spool: Path) -> None:
    """So that opening it finds nothing, and reading it does: a page that says where the row goes on."""
    with contextlib.closing(sqlite3.connect(spool)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        (page,) = connection.execute(
            "SELECT pageno FROM dbstat WHERE name = 'groups' AND path LIKE '%+000000' LIMIT 1 OFFSET 20"
        ).fetchone()
    with spool.open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(os.urandom(page_bytes))


def test_a_damaged_spool_waits_for_room_to_be_saved(tmp_path: Path) -> None:
    """What can be read of it is delivered once there is room for a new file, and what comes after it as well."""
    gateway = spooled_gateway(tmp_path / "g")
    fleet_devices = devices(gateway, 2)
    outage = Outage(gateway)
    folder = tmp_path / "g" / "data" / "spool"
    with needed_small_disk(folder, 8 << 20) as ballast:
        with running(gateway):
            outage.begin()
            with Fleet(lambda: port_of(gateway), fleet_devices) as fleet:
                fleet.wait_for_acknowledged(5000)
        outage.end()
        (spool,) = (folder / "readings").glob("*.db")
        damage_in_the_middle_of_a_row(spool)
        fill(ballast)
        os.truncate(ballast, ballast.stat().st_size - ROOM_TO_OPEN_BYTES)
        with running(gateway):
            gateway.wait_for_event("spool_unreadable")
            assert not list(spool.parent.glob("*.damaged"))
            ballast.unlink()
            gateway.wait_for_event("spool_damaged")
            with Fleet(lambda: port_of(gateway), fleet_devices) as later:
                later.wait_for_acknowledged(100)
            wait_for(lambda: all_delivered(gateway), DELIVERED_S, "the spool is empty")
        lost = len(fleet.acknowledged) + len(later.acknowledged) - len(gateway.output_events())
        assert 0 <= lost <= 2 * BATCH_MESSAGES_MAX


def test_a_disk_that_is_full_at_the_start_is_not_littered(tmp_path: Path) -> None:
    """A spool is wanted again and again, and cannot be opened: none of the tries leaves a file."""
    gateway = spooled_gateway(tmp_path / "g")
    (device,) = devices(gateway, 1)
    folder = tmp_path / "g" / "data" / "spool"
    with needed_small_disk(folder, 1 << 20) as ballast:
        fill(ballast)
        with running(gateway):
            gateway.wait_for_event("spool_unusable")
            time.sleep(3)  # six more tries
            assert not list((folder / "readings").glob("*.db"))
            assert len(gateway.events("spool_unusable")) <= 4
            ballast.unlink()
            with Fleet(lambda: port_of(gateway), [device]) as fleet:
                fleet.wait_for_acknowledged(10)
        assert set(fleet.errors) <= {"unavailable"}
