"""gatewayctl drain: the node runs empty, spread over the deadline, and stays for its spools."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.devices import End, TlsDevice
from tests.support.gateway import new_gateway, running, wait_for

SESSIONS = 12
DEADLINE_S = 4


def test_a_node_runs_empty(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2")
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway), contextlib.ExitStack() as stack:
        port, workers = gateway.port(), gateway.worker_pids()
        sessions = [stack.enter_context(TlsDevice.connect(port, device)) for _ in range(SESSIONS)]
        ends: list[float] = []

        def hang_up(session: TlsDevice) -> None:
            assert session.receive_to_end() == b""
            ends.append(time.monotonic())
            assert session.end is End.NOTIFIED
            session.close()

        threads = [threading.Thread(target=hang_up, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        done = gateway.ctl("drain", "--deadline", f"{DEADLINE_S}s", "--json")
        for thread in threads:
            thread.join(10)
        document = json.loads(done.stdout)
        assert {key: document[key] for key in ("sessions", "left", "spooled_messages")} == {
            "sessions": SESSIONS, "left": 0, "spooled_messages": 0
        }  # fmt: skip
        assert len(ends) == SESSIONS
        assert DEADLINE_S / 4 < max(ends) - min(ends) < DEADLINE_S
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        status, body = gateway.http("/readyz")
        assert status == 503
        assert "drained" in body
        assert gateway.worker_pids() == workers, "they stay for their spools"
        assert gateway.process is not None
        os.kill(gateway.process.pid, signal.SIGHUP)
        wait_for(lambda: gateway.events("reload_refused"), what="a reload is refused")
        assert "Drained: 0 sessions ended" in gateway.ctl("drain", "--deadline", "1s").stdout
        assert gateway.stop() == 0


def test_no_gateway_and_no_time(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    assert "no gateway answers there" in gateway.ctl("drain", check=False).stderr
    assert "is not a duration" in gateway.ctl("drain", "--deadline", "soon", check=False).stderr
