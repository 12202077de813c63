"""Clients that stop reading while much is sent to them: they cost a bounded buffer each, and nobody else notices."""

import contextlib
import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gateway.registry.store import NewDevice
from tests.support.devices import TlsDevice
from tests.support.gateway import new_gateway, running, wait_for
from tests.support.services import Service, speaks_first

POUR = bytes(1 << 20)
"""What the service sends to each of them at once: far more than anybody buffers."""
KB_EACH_MAX = 200
"""Resident memory for one that does not read: what TLS holds, 64 KiB towards the device, 64 KiB from the service."""
ROUTES = """
[[routes]]
name = "stream"
match = { identity = "slow" }
framing = "stream"
backend = "service"
[[routes]]
name = "lines"
framing = "lines"
content_type = "text/plain"
backend = "events"
"""


@pytest.mark.parametrize(
    "count", [500, pytest.param(5000, marks=[pytest.mark.prove, pytest.mark.timeout(600)])]
)
def test_clients_that_stop_reading(tmp_path: Path, count: int, measured: Callable[[str], None]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with Service(speaks_first(POUR)) as service:
        gateway = new_gateway(
            tmp_path / "gateway",
            routes=ROUTES,
            node="workers = 1",
            backends=f'[backends.service]\nkind = "tcp"\nurl = "{service.url}"\n',
        )
        slow, beside = gateway.add_devices(NewDevice(identity="slow"), NewDevice(identity="beside"))
        with running(gateway), contextlib.ExitStack() as stack:
            port = gateway.port()
            (worker,) = (psutil.Process(pid) for pid in gateway.worker_pids())
            neighbour = stack.enter_context(TlsDevice.connect(port, beside))
            neighbour.send(b"line\n")
            neighbour.receive_line()
            before = worker.memory_info().rss
            for _ in range(count):
                stack.enter_context(TlsDevice.connect(port, slow, receive_buffer_bytes=4096))
            wait_for(lambda: gateway.metric("pskgw_connections") == count + 1, 30, "all connected")
            sent = -1.0
            while sent != (sent := gateway.metric("pskgw_sent_bytes_total", route="stream")):
                time.sleep(0.5)  # until nothing moves any more
            each_kb = (worker.memory_info().rss - before) / count / 1024
            waits = []
            for number in range(2, 102):
                asked = time.monotonic()
                neighbour.send(b"line\n")
                assert neighbour.receive_line() == f"ok {number}"
                waits.append(time.monotonic() - asked)
        assert gateway.complaints() == []
    measured(
        f"{count} clients stopped reading: {each_kb:.0f} KB each, slowest of 100 answers beside "
        f"{1000 * max(waits):.0f} ms"
    )
    assert each_kb < KB_EACH_MAX
    assert max(waits) < 1
