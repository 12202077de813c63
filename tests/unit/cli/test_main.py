import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import gateway.cli
from gateway import __version__
from gateway.cli import root_app
from gateway.cli.realms import app as realms_app
from tests.support.commands import Run

HEAVY_MODULES = {"sqlalchemy", "pydantic", "OpenSSL", "lmdb", "prometheus_client", "alembic", "aiohttp"}


def gatewayctl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gateway", *arguments]


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"gatewayctl {__version__}\n"


def test_help_names_every_command_in_its_panel(run: Run) -> None:
    out = run("--help").out
    for name in (
        "init",
        "run",
        "check-config",
        "migrate",
        "add-realm",
        "list-realms",
        "add-device",
        "connect",
    ):
        assert name in out
    assert out.index("Set up") < out.index("Realms") < out.index("Devices")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["list-devices", "--frob"],
        ["add-device"],
        ["list-devices", "--limit", "0"],
        ["list-devices", "--limit", "many"],
    ],
)
def test_wrong_usage_ends_with_2_and_says_so_on_stderr(run: Run, arguments: list[str]) -> None:
    done = run(*arguments, status=2)
    assert done.out == ""
    assert "Usage: gatewayctl" in done.err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom gateway.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        f"print('heavy:', sorted({HEAVY_MODULES!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family of commands with one that breaks."""
    app = typer.Typer()

    @app.command()
    def break_down(what: str) -> None:
        raise {"key": KeyError("hunter2"), "os": OSError(28, "No space left on device")}[what]

    @app.command()
    def other() -> None: ...

    monkeypatch.setattr(realms_app, "registered_commands", app.registered_commands)


@pytest.mark.usefixtures("failing")
def test_a_bug_is_one_line_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PSKGW_TRACEBACK", raising=False)
    done = run("break-down", "key", status=1)
    assert done.err.startswith("error: internal error (KeyError): set PSKGW_TRACEBACK=1")
    assert "hunter2" not in done.err


@pytest.mark.usefixtures("failing")
def test_a_bug_shows_its_traceback_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PSKGW_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        gateway.cli.main(["break-down", "key"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("failing")
def test_an_error_of_the_system_is_one_line(run: Run) -> None:
    assert run("break-down", "os", status=1).err == "error: No space left on device\n"


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    process = subprocess.Popen(
        gatewayctl("list-devices", "--json"), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 1


def test_a_full_disk_behind_stdout_is_an_error(folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            gatewayctl("list-realms"), cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_ctrl_c_ends_quietly_with_130(folder: Path) -> None:
    command = gatewayctl("add-device", "d", "--key-stdin")
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while "pipe_read" not in Path(f"/proc/{process.pid}/wchan").read_text() and not _waits_for_stdin(
            process.pid
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"")


def _waits_for_stdin(pid: int) -> bool:
    """Whether a process is in read(0, ...), where /proc tells."""
    try:
        call = Path(f"/proc/{pid}/syscall").read_text().split()
    except OSError:
        return False
    read = {"x86_64": "0", "aarch64": "63"}.get(os.uname().machine)
    return call[:2] == [read, "0x0"]


def test_every_command_says_what_it_does() -> None:
    for command in typer.main.get_command(root_app()).commands.values():  # type: ignore[attr-defined]  # a group
        assert command.help, command.name
        assert command.help.rstrip().endswith("."), command.name


def test_a_command_does_not_look_through_all_that_it_holds_at_its_end() -> None:
    program = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))
from gateway.cli import main
main()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.splitlines() == [f"gatewayctl {__version__}", "True"]
