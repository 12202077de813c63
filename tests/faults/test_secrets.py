"""Keys stay where they belong: in no core file, no debugger of the same user, no log, metric, environment or process list."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.capabilities import missing
from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

WRONG_KEY = "5e" * 32


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_crash_leaves_no_core_file(tmp_path: Path, number: int) -> None:
    crash = f"import os; os.kill(os.getpid(), {number})"
    if not _dumps_core(crash, tmp_path):
        missing("this machine writes no core files")
    assert not _dumps_core(
        f"from gateway.server.processes.hardening import harden; harden(); {crash}", tmp_path
    )


def _dumps_core(code: str, directory: Path) -> bool:
    allow = "import resource as r; r.setrlimit(r.RLIMIT_CORE, (r.getrlimit(r.RLIMIT_CORE)[1],) * 2); "
    child = subprocess.Popen([sys.executable, "-c", allow + code], cwd=directory)
    _, status = os.waitpid(child.pid, 0)
    child.returncode = status
    assert os.WIFSIGNALED(status)
    return os.WCOREDUMP(status)


def test_the_same_user_reads_neither_environment_nor_memory(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    try:
        gateway.start(prefix=_unprivileged())
        pids = gateway.pids()
        assert len(pids) == 3
        for pid in pids:
            limits = Path(f"/proc/{pid}/limits").read_text()
            (core,) = [line.split() for line in limits.splitlines() if line.startswith("Max core file size")]
            assert core[4:6] == ["0", "0"]
            assert not _may_see(pid)
        with _sleeping() as plain:
            assert _may_see(plain)  # so it is ours that are refused
        assert gateway.stop() == 0
    finally:
        gateway.kill()


@contextlib.contextmanager
def _sleeping() -> Iterator[int]:
    plain = subprocess.Popen([*_unprivileged(), "sleep", "60"])
    try:
        wait_for(lambda: b"sleep" in Path(f"/proc/{plain.pid}/comm").read_bytes(), what="the program")
        yield plain.pid
    finally:
        plain.kill()
        plain.wait()


def _may_see(pid: int) -> bool:
    """Whether another process of this user, without privileges, reads the environment or attaches a debugger."""
    attach = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) != 0)"
    commands = (["cat", f"/proc/{pid}/environ"], ["cat", f"/proc/{pid}/maps"], [sys.executable, "-c", attach])
    seen = {
        subprocess.run([*_unprivileged(), *command], capture_output=True, check=False, timeout=20).returncode
        == 0
        for command in commands
    }
    assert len(seen) == 1, "all of it or nothing"
    return seen.pop()


def _unprivileged() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]


def test_keys_are_in_no_log_metric_environment_or_process_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_gateway(tmp_path / "gateway")
    master_key_file = first.directory / "master.key"
    master_key = master_key_file.read_text().strip()
    master_key_file.unlink()
    first.config.write_text(first.config.read_text().replace('master_key_file = "master.key"\n', ""))
    monkeypatch.setenv("PSKGW_REGISTRY__MASTER_KEY", master_key)
    gateway = Gateway(first.directory)  # with this environment
    device, other = gateway.add_devices(NewDevice(identity="meter"), NewDevice(identity="other"))
    with running(gateway):
        port = gateway.port()
        with TlsDevice.connect(port, device) as connected:
            connected.send(b"a reading\n")
            assert connected.receive_line() == "ok 1"
        for wrong in (Device(device.identity, WRONG_KEY), Device("stranger", WRONG_KEY)):
            with pytest.raises(Refused):
                TlsDevice.connect(port, wrong)
        secrets = [device.key, other.key, master_key, WRONG_KEY]
        for pid in gateway.pids():
            _check(Path(f"/proc/{pid}/cmdline").read_bytes(), secrets)
            assert gateway.process is not None
            if pid != gateway.process.pid:  # its own came from whoever started it
                _check(Path(f"/proc/{pid}/environ").read_bytes(), [*secrets, "PSKGW_"])
        _check(subprocess.run(["ps", "auxeww"], capture_output=True, check=True).stdout, [device.key])
        _check(gateway.http("/metrics")[1].encode(), secrets)
        _check(gateway.ctl("check-config").stdout.encode(), secrets)
        (worker,) = gateway.worker_pids()
        os.kill(worker, signal.SIGABRT)  # with whatever a dying interpreter prints
        wait_for(lambda: gateway.worker_pids() not in ([], [worker]), what="another worker")
        assert gateway.stop() == 0
    _check(gateway.log_path.read_bytes(), secrets)


def _check(text: bytes, secrets: list[str]) -> None:
    for secret in secrets:
        assert secret.encode() not in text
        if len(secret) == len(WRONG_KEY):
            assert secret.upper().encode() not in text
            assert bytes.fromhex(secret) not in text


def test_files_open_to_others_are_said_at_the_start(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    (gateway.directory / "registry.db").chmod(0o644)
    (gateway.directory / "data").mkdir(mode=0o755)
    with running(gateway):
        said = {event["fix"] for event in gateway.events("files_exposed")}
        assert said == {
            f"chmod 600 {gateway.directory / 'registry.db'}",
            f"chmod 700 {gateway.directory / 'data'}",
        }
        data = gateway.directory / "data"
        for name in ("lock", "control.sock"):
            assert (data / name).stat().st_mode & 0o077 == 0, name
        for path in (data / "replica").rglob("data.mdb"):
            assert path.stat().st_mode & 0o077 == 0, path
        assert gateway.stop() == 0


def test_a_master_key_open_to_others_stops_the_start(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    (gateway.directory / "master.key").chmod(0o640)
    done = gateway.ctl("run", check=False)
    assert done.returncode == 1
    assert f"chmod 600 {gateway.directory / 'master.key'}" in done.stderr
