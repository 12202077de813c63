"""Descriptors run out: sessions go on, and accepting goes on once there are some again."""

import contextlib
import resource
import time
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from gateway.server.processes.open_files import FILES_RESERVED
from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import new_gateway, wait_for

ROOM = 20


@pytest.mark.parametrize("asyncio_only", [False, True], ids=["uvloop", "asyncio"])
def test_connections_leave_descriptors_in_reserve(tmp_path: Path, asyncio_only: bool) -> None:
    gateway = new_gateway(tmp_path / "gateway", asyncio_only=asyncio_only)
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    files = FILES_RESERVED + ROOM
    try:
        gateway.start(prefix=["prlimit", f"--nofile={files}:{files}"])
        assert gateway.wait_for_event("few_open_files")["connections_per_worker"] == ROOM
        port = gateway.port()
        with contextlib.ExitStack() as held:
            devices = [held.enter_context(TlsDevice.connect(port, device)) for _ in range(ROOM)]
            for _ in range(3):
                with pytest.raises((Refused, ConnectionError)):
                    TlsDevice.connect(port, device)
            for each in devices:
                each.send(b"still here\n")
                assert each.receive_line() == "ok 1"
            devices[0].reset()
            wait_for(lambda: gateway.metric("pskgw_connections") == ROOM - 1, what="a free place")
            held.enter_context(TlsDevice.connect(port, device)).send(b"let in\n")
        assert gateway.stop() == 0
        assert gateway.complaints() == []
    finally:
        gateway.kill()


@pytest.mark.parametrize("asyncio_only", [False, True], ids=["uvloop", "asyncio"])
def test_accepting_goes_on_when_there_are_descriptors_again(tmp_path: Path, asyncio_only: bool) -> None:
    """The limit of the running worker is lowered to what it has open: accept fails with EMFILE."""
    gateway = new_gateway(tmp_path / "gateway", asyncio_only=asyncio_only)
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    try:
        gateway.start()
        port = gateway.port()
        (worker,) = gateway.worker_pids()
        with TlsDevice.connect(port, device) as live:
            before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
            open_now = max(int(each.name) for each in Path(f"/proc/{worker}/fd").iterdir()) + 1
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (open_now, before[1]))
            with contextlib.ExitStack() as held:
                waiting = [held.enter_context(TlsDevice(port, device)) for _ in range(open_now)]
                gateway.wait_for_event("accept_failed")
                for number in range(1, 4):
                    began = time.monotonic()
                    live.send(b"still here\n")
                    assert live.receive_line() == f"ok {number}"
                    assert time.monotonic() - began < 1
                resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
                for each in waiting:
                    each.handshake()
                waiting[-1].send(b"waited\n")
                assert waiting[-1].receive_line() == "ok 1"
        assert gateway.stop() == 0
    finally:
        gateway.kill()
