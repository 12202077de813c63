"""Disks that are full or turn read-only: under the log, under what a node keeps, under the registry.

A full disk under a spool stands in `test_spool.py`, one under the replica in `test_replica_on_a_full_disk.py`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.capabilities import (
    FailingDisk,
    Unavailable,
    failing_disk,
    fill,
    missing,
    needed_small_disk,
)
from tests.support.devices import Refused, TlsDevice
from tests.support.fleet import Fleet, judge
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

SPOOLED = '[[routes]]\nname = "readings"\nframing = "lines"\ndelivery = "spooled"\ncontent_type = "text/plain"\nbackend = "events"\n'


@contextlib.contextmanager
def disk_that_fails(directory: Path) -> Iterator[FailingDisk]:
    try:
        with failing_disk(directory) as disk:
            yield disk
    except Unavailable as exc:
        missing(str(exc))


def use(gateway: Gateway, device: Device) -> None:
    """A device connects and sends a line, within a second."""
    began = time.monotonic()
    with TlsDevice.connect(gateway.port(), device) as connection:
        connection.send(b"line\n")
        assert connection.receive_line() == "ok 1"
    assert time.monotonic() - began < 1


def check_refused(gateway: Gateway, *command: str) -> None:
    """gatewayctl says in one line that it could not write."""
    done = gateway.ctl(*command, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "buffered", [True, pytest.param(False, marks=pytest.mark.prove)], ids=["buffered", "unbuffered"]
)
def test_full_under_the_log(tmp_path: Path, buffered: bool) -> None:
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2")
    if buffered:
        gateway.unset("PYTHONUNBUFFERED")
    (device, revoked) = gateway.add_devices(NewDevice(identity="d"), NewDevice(identity="revoked"))
    with needed_small_disk(tmp_path / "small", 1 << 20) as ballast:
        gateway.log_path = tmp_path / "small" / "log.jsonl"
        with running(gateway):
            port = gateway.port()
            with TlsDevice.connect(port, device) as before, TlsDevice.connect(port, revoked) as doomed:
                fill(ballast)
                size = gateway.log_path.stat().st_size
                for _ in range(100):  # more than a buffer of lines
                    use(gateway, device)
                with gateway.registry() as registry:
                    registry.revoke_key("default", "revoked")
                assert doomed.receive_to_end() == b""
                before.send(b"still here\n")
                assert before.receive_line() == "ok 1"
                assert gateway.log_path.stat().st_size <= size + 4096
                assert gateway.http("/readyz") == (200, '{"status": "ready"}')
                assert gateway.metric("pskgw_process_restarts_total") == 0
                ballast.unlink()
                known = len(gateway.events("connection_ended"))
                use(gateway, device)
                wait_for(lambda: len(gateway.events("connection_ended")) > known, what="the log goes on")
            assert gateway.stop() == 0


def test_read_only_under_the_node(tmp_path: Path, measured: Callable[[str], None]) -> None:
    """What is not safe is not acknowledged, what was is kept, and who is revoked is out."""
    gateway = new_gateway(
        tmp_path / "gateway",
        node="workers = 2",
        routes=SPOOLED
        + '[[routes]]\nname = "direct"\nframing = "lines"\ncontent_type = "text/plain"\nbackend = "events"\n',
    )
    text = gateway.config.read_text().replace(
        'name = "readings"', 'name = "readings"\nmatch = { identity = "d*" }'
    )
    gateway.config.write_text(text)
    *devices, beside, revoked = gateway.add_devices(
        *(NewDevice(identity=name) for name in ("d0", "d1", "d2", "d3", "beside", "revoked"))
    )
    with disk_that_fails(gateway.directory / "data") as disk:
        with running(gateway):
            with (
                TlsDevice.connect(gateway.port(), revoked) as doomed,
                Fleet(gateway.port, devices, rate=100) as fleet,
            ):
                fleet.wait_for_acknowledged(500)
                disk.fail()
                refused = fleet.errors.total()
                wait_for(lambda: fleet.errors.total() > refused + 100, 20, "refusals")
                use(gateway, beside)
                with gateway.registry() as registry:
                    registry.revoke_key("default", "revoked")
                assert doomed.receive_to_end() == b""
                with pytest.raises(Refused):
                    TlsDevice.connect(gateway.port(), revoked)
                assert "replica cannot be written" in gateway.http("/readyz")[1]
                assert gateway.metric("pskgw_process_restarts_total") == 0
            gateway.stop()
        disk.repair()
        at = time.monotonic()
        with running(gateway):
            wait_for(lambda: gateway.metric("pskgw_outbox_messages") == 0, 30, "the spool is empty")
            with pytest.raises(Refused):
                TlsDevice.connect(gateway.port(), revoked)
            use(gateway, devices[0])
            recovered_s = time.monotonic() - at
            events = [e for e in gateway.output_events() if e["data"].count("/") > 1]
            found = judge(fleet.acknowledged, events).check()
    measured(
        f"data_dir turned read-only: {found.acknowledged} acknowledged, {len(found.missing)} lost, refused as "
        f"{dict(fleet.errors)}; {recovered_s:.1f} s from the start on the repaired disk"
    )


def test_full_under_the_registry(tmp_path: Path) -> None:
    with needed_small_disk(tmp_path / "small", 4 << 20) as ballast:
        gateway = new_gateway(
            tmp_path / "gateway", node="workers = 2", registry_url=f"sqlite:///{tmp_path}/small/registry.db"
        )
        gateway.ctl("migrate")
        (device,) = gateway.add_devices(NewDevice(identity="d"))
        with running(gateway):
            fill(ballast)
            for number in range(200):  # until no page is left
                if gateway.ctl("add-device", f"more-{number}", check=False).returncode:
                    break
            check_refused(gateway, "add-device", "one-more")
            use(gateway, device)
            ballast.unlink()
            late = gateway.add_device("late")
            gateway.wait_until_followed()
            use(gateway, late)
            wait_for(lambda: gateway.http("/readyz") == (200, '{"status": "ready"}'), 20, "ready")
            assert gateway.metric("pskgw_process_restarts_total") == 0


def test_read_only_under_the_registry(tmp_path: Path) -> None:
    with disk_that_fails(tmp_path / "disk") as disk:
        gateway = new_gateway(
            tmp_path / "gateway", node="workers = 2", registry_url=f"sqlite:///{tmp_path}/disk/registry.db"
        )
        gateway.ctl("migrate")
        (device,) = gateway.add_devices(NewDevice(identity="d"))
        with running(gateway):
            use(gateway, device)
            disk.fail()
            check_refused(gateway, "add-device", "one-more")
            use(gateway, device)
            assert gateway.http("/healthz")[0] == 200
            assert gateway.metric("pskgw_process_restarts_total") == 0
            assert gateway.stop() == 0
        disk.repair()
        with running(gateway):
            late = gateway.add_device("late")
            gateway.wait_until_followed()
            use(gateway, late)
