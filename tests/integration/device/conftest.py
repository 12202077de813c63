"""What the tests of the device's end share."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.gateway import Device, wait_for

Start = Callable[..., "subprocess.Popen[str]"]


def need(program: str) -> str:
    """The path of a program; without it the test is skipped, or fails where everything must be there."""
    found = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin")
    if found is None:
        assert not os.environ.get("CI"), f"{program} is not installed"
        pytest.skip(f"{program} is not installed")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def key_file(folder: Path, device: Device) -> Path:
    return private(folder / f"{device.identity}.key", device.key + "\n")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `gatewayctl ARGUMENTS` (or another program), which is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, program: str | None = None) -> "subprocess.Popen[str]":
        command = [program] if program else [sys.executable, "-m", "gateway"]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@pytest.fixture
def start_tunnel(start: Start, tmp_path: Path) -> Callable[[int, Device], int]:
    """Start a tunnel to a gateway's port as a device; the port that plain clients connect to."""

    def start_tunnel(port: int, device: Device) -> int:
        process = start(
            "tunnel", "--listen", "127.0.0.1:0", "--connect", f"127.0.0.1:{port}",
            "--identity", device.identity, "--key-file", key_file(tmp_path, device),
        )  # fmt: skip
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+), connecting to 127\.0\.0\.1:\d+\n", said)
        assert found, said + (process.stderr.read() if process.poll() is not None else "")
        return int(found.group(1))

    return start_tunnel


@pytest.fixture
def broker(start: Start, tmp_path: Path) -> int:
    """A Mosquitto without TLS; its port."""
    port = free_port()
    configuration = private(
        tmp_path / "mosquitto.conf",
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nuser root\n",
    )
    start("-c", configuration, program=need("mosquitto"))
    wait_for(lambda: accepts(port), what="Mosquitto")
    return port
