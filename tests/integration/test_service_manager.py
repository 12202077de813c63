"""What systemd hears and sees: sd_notify over a real socket, the watchdog, and a unit that it takes."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway import Gateway, new_gateway, wait_for
from tests.support.recipes import need_program as need

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
WATCHDOG_S = 3.0


class Systemd:
    """The other end of $NOTIFY_SOCKET. `said` is what came, one dictionary for each datagram, with when."""

    def __init__(self, address: str) -> None:
        self.said: list[tuple[float, dict[str, str]]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self._sock.settimeout(0.1)
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def close(self) -> None:
        self._is_closed = True
        self._thread.join()
        self._sock.close()

    def heard(self, name: str, value: str | None = None) -> list[float]:
        """When a line of this name, and value, came."""
        return [at for at, lines in list(self.said) if name in lines and value in (None, lines[name])]

    @property
    def status(self) -> str:
        return next((lines["STATUS"] for _, lines in reversed(list(self.said)) if "STATUS" in lines), "")

    def _listen(self) -> None:
        while not self._is_closed:
            with contextlib.suppress(TimeoutError):
                text = self._sock.recv(65536).decode()
                lines = dict(line.split("=", 1) for line in text.splitlines())
                self.said.append((time.monotonic(), lines))


@pytest.fixture(params=["path", "abstract"])
def systemd(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Systemd]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@pskgw-test-{os.getpid()}"
    systemd = Systemd(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
    yield systemd
    systemd.close()


@pytest.fixture
def gateway(systemd: Systemd, tmp_path: Path) -> Iterator[Gateway]:
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2")
    gateway.start()
    wait_for(lambda: systemd.heard("READY"), what="READY=1")
    yield gateway
    gateway.kill()


def test_ready_reloading_and_stopping(systemd: Systemd, gateway: Gateway) -> None:
    assert gateway.process is not None
    wait_for(lambda: systemd.status == "2 workers accept devices", what="the status")
    began = time.monotonic_ns() // 1000
    os.kill(gateway.process.pid, signal.SIGHUP)
    wait_for(lambda: len(systemd.heard("READY")) == 2, what="READY=1 after the reload")
    (reloading,) = [lines for _, lines in systemd.said if "RELOADING" in lines]
    assert began <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert systemd.heard("READY")[0] < systemd.heard("RELOADING", "1")[0] < systemd.heard("READY")[1]

    gateway.config.write_text(gateway.config.read_text().replace("[limits]", "[limits]\nx = 1"))
    os.kill(gateway.process.pid, signal.SIGHUP)
    wait_for(lambda: len(systemd.heard("READY")) == 3, what="READY=1 after a refused reload")
    assert "reload refused" in systemd.status
    assert "limits.x" in systemd.status

    gateway.config.write_text(gateway.config.read_text().replace("[limits]\nx = 1", "[limits]"))
    os.kill(gateway.process.pid, signal.SIGUSR2)
    wait_for(lambda: len(systemd.heard("READY")) == 4, 30, "READY=1 after the upgrade")
    gateway.stop()
    assert systemd.heard("STOPPING", "1")


def test_the_watchdog_hears_from_workers_that_answer(systemd: Systemd, gateway: Gateway) -> None:
    wait_for(lambda: len(systemd.heard("WATCHDOG")) >= 3, what="signs of life")
    first, second, *_ = gateway.worker_pids()
    os.kill(first, signal.SIGSTOP)
    gateway.wait_for_event("child_killed", 20)  # and so replaced
    wait_for(lambda: len(gateway.worker_pids()) == 2 and first not in gateway.worker_pids(), 20)
    beats = systemd.heard("WATCHDOG")
    assert max(later - earlier for earlier, later in itertools.pairwise(beats)) < WATCHDOG_S
    wait_for(lambda: gateway.http("/readyz")[1] == '{"status": "ready"}', 20, "both are ready")
    stopped = gateway.worker_pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(WATCHDOG_S / 3 + 0.5)  # what was asked before is answered or not by now
        silent_from = len(systemd.heard("WATCHDOG"))
        time.sleep(WATCHDOG_S)  # systemd would end it now
        assert len(systemd.heard("WATCHDOG")) == silent_from
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: len(systemd.heard("WATCHDOG")) > silent_from, what="signs of life again")
    assert second in gateway.worker_pids()


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    text = (UNITS / "psk-gateway.service").read_text()
    assert "Type=notify" in text
    unit = tmp_path / "psk-gateway.service"
    unit.write_text(re.sub(r"/opt/psk-gateway/bin/gatewayctl", "/bin/true", text))
    shutil.copytree(UNITS / "psk-gateway.service.d", tmp_path / "psk-gateway.service.d")
    (version,) = re.findall(r"^systemd (\d+)", _run(analyze, "--version").stdout, re.MULTILINE)
    if int(version) < 253:  # the drop-in is not for this one
        shutil.rmtree(tmp_path / "psk-gateway.service.d")
    verified = _run(analyze, "verify", "--man=no", str(unit))
    assert verified.returncode == 0, verified.stderr
    assert unit.name not in verified.stderr, verified.stderr
    rated = _run(analyze, "security", "--offline=true", "--threshold=20", "--no-pager", str(unit))
    assert rated.returncode == 0, rated.stdout.splitlines()[-1]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
