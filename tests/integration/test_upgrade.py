"""SIGUSR2: the supervisor goes on as the program on the disk, under its process id; devices are ended once, or not at all."""

import os
import re
import shutil
import signal
import site
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway as package
from gateway.registry.store import NewDevice
from tests.support.devices import End, TlsDevice
from tests.support.fleet import Fleet, judge
from tests.support.gateway import Gateway, new_gateway, running, wait_for

CODE = Path(package.__file__).parent


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with running(new_gateway(tmp_path / "gateway", node="workers = 2")) as gateway:
        yield gateway


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the program, for gateways that are started from now on; a test may install another one over it."""
    shutil.copytree(CODE, tmp_path / "code" / "gateway")
    shutil.copytree(CODE.parent / "migrations", tmp_path / "code" / "migrations")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # else the current directory comes first
    return tmp_path / "code" / "gateway"


def pid(gateway: Gateway) -> int:
    assert gateway.process is not None
    return gateway.process.pid


def upgrade(gateway: Gateway, number: int = signal.SIGUSR2) -> None:
    """Upgrade, and wait until new workers serve."""
    done = len(gateway.events("upgraded"))
    os.kill(pid(gateway), number)
    wait_for(lambda: len(gateway.events("upgraded")) > done, 30, f"an upgrade; log: {gateway.log_path}")


def refused(gateway: Gateway, number: int = signal.SIGUSR2) -> str:
    """Try to, and wait until it is refused; the reason."""
    before = len(gateway.events("upgrade_refused"))
    os.kill(pid(gateway), number)
    wait_for(lambda: len(gateway.events("upgrade_refused")) > before, 30, "a refused upgrade")
    assert gateway.http("/readyz")[0] == 200
    return str(gateway.events("upgrade_refused")[-1]["reason"])


def talk(device: TlsDevice, number: int) -> None:
    device.send(b"line\n")
    assert device.receive_line() == f"ok {number}"


@pytest.mark.parametrize("asyncio_only", [False, True], ids=["uvloop", "asyncio"])
def test_one_orderly_close_and_nothing_else(tmp_path: Path, asyncio_only: bool) -> None:
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2", asyncio_only=asyncio_only)
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        port, workers, follower = gateway.port(), gateway.worker_pids(), gateway.follower_pid()
        with TlsDevice.connect(port, device) as old:
            talk(old, 1)
            upgrade(gateway)
            with TlsDevice.connect(port, device) as new:
                talk(new, 1)
                assert old.receive_to_end() == b""
                assert old.end is End.NOTIFIED
                wait_for(lambda: len(gateway.worker_pids()) == 2, what="the old workers are gone")
                assert not {follower, *workers} & {gateway.follower_pid(), *gateway.worker_pids()}
                talk(new, 2)
                gateway.add_device("later")  # the new follower follows
                gateway.wait_until_followed()
        assert gateway.metric("pskgw_messages_received_total") == 3, "the counts of before are kept"
        assert gateway.metric_by("outcome", "pskgw_upgrades_total") == {"done": 1}
        assert gateway.metric("pskgw_process_restarts_total") == 0
        assert gateway.sessions() == []
    assert gateway.complaints() == []


def test_a_program_that_cannot_run_is_refused_before_anything_stops(own_code: Path, tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway), TlsDevice.connect(gateway.port(), device) as session:
        workers = gateway.worker_pids()
        # Each of another length: Python tells by length and second whether what it has compiled is of this file.
        for file, before, after, reason in (
            ("server/processes/worker.py", "import socket\n", "import gone\n", "ModuleNotFoundError"),
            ("registry/schema.py", 'SCHEMA_REVISION = "', 'SCHEMA_REVISION = "0', "know schema 0006"),
            (
                "server/supervision/upgrade.py",
                "FORMAT: Final = 1",
                "FORMAT: Final = 22",
                "hands over format 1",
            ),
            ("__main__.py", "from gateway", "from nowhere_at_all", "nowhere"),
        ):
            good = (own_code / file).read_text()
            assert before in good
            (own_code / file).write_text(good.replace(before, after, 1))
            assert reason in refused(gateway, signal.SIGHUP)  # a reload finds that the program is another one
            (own_code / file).write_text(good)
        talk(session, 1)
        assert gateway.worker_pids() == workers
        assert gateway.metric_by("outcome", "pskgw_upgrades_total") == {"refused": 4}
        text = gateway.config.read_text()
        gateway.config.write_text(text.replace("[limits]", "[limits"))
        assert "not valid TOML" in refused(gateway)
        gateway.config.write_text(text.replace('data_dir = "data"', 'data_dir = "elsewhere"'))
        assert "node.data_dir" in refused(gateway)
        gateway.config.write_text(text)
        talk(session, 2)


def test_a_reload_after_an_installation_is_an_upgrade(own_code: Path, tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    with running(gateway):
        assert gateway.metric("pskgw_build_info", version=package.__version__) == 1
        init = own_code / "__init__.py"
        init.write_text(re.sub(r'__version__ = "[^"]*"', '__version__ = "99.0"', init.read_text()))
        upgrade(gateway, signal.SIGHUP)
        assert gateway.metric("pskgw_build_info", version="99.0") == 1
        upgrade(gateway)


def test_an_interpreter_that_is_gone_loses_nothing(
    own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check passes, and then execve fails: the channels are taken back."""
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2")
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(own_code.parent), *site.getsitepackages()]))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(interpreter))
        gateway = Gateway(gateway.directory)
        gateway.start()
    try:
        with TlsDevice.connect(gateway.port(), device) as session:
            talk(session, 1)
            assert gateway.metric("pskgw_messages_received_total") == 1
            check = own_code / "cli" / "config.py"
            gone = "    check_format()\n    import os, sys; os.unlink(sys.executable)\n"
            check.write_text(check.read_text().replace("    check_format()\n", gone))
            assert "cannot be executed: No such file" in refused(gateway)
            talk(session, 2)
            assert gateway.metric("pskgw_messages_received_total") == 2
            assert len(gateway.sessions()) == 1
            gateway.add_device("later")
            gateway.wait_until_followed()
            assert gateway.metric("pskgw_process_restarts_total") == 0
    finally:
        gateway.kill()


def test_a_worker_that_hangs_does_not_keep_an_upgrade(gateway: Gateway) -> None:
    devices = gateway.add_devices(*(NewDevice(identity=f"d{number}") for number in range(8)))
    gateway.wait_until_followed()
    hung = gateway.worker_pids()[0]
    with Fleet(gateway.port, devices, rate=20) as fleet:
        fleet.wait_for_acknowledged(50)
        os.kill(hung, signal.SIGSTOP)
        upgrade(gateway)
        fleet.wait_for_acknowledged(50)
        wait_for(lambda: hung not in gateway.pids(), 20, "the hung one is killed")
        fleet.wait_for_acknowledged(50)
    assert len(gateway.worker_pids()) == 2
    judge(fleet.acknowledged, gateway.output_events()).check()
