"""A real Mosquitto on an ephemeral port, with the clients of its package."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gateway import wait_for

__all__ = ["Mosquitto", "free_port", "mosquitto"]


def free_port() -> int:
    """A TCP port of this host that nobody uses just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def program(name: str) -> str:
    """The path of a program; without it the test is skipped, or fails where CI is set."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class Mosquitto:
    """A broker in `directory`; `start` and `stop` as often as needed, always on the same port."""

    def __init__(self, directory: Path, settings: str = "allow_anonymous true") -> None:
        self.port = free_port()
        self.log_path = directory / "mosquitto.log"
        self._config = directory / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nlog_dest stderr\nlog_type all\nconnection_messages true\nuser root\n{settings}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [program("mosquitto"), "-c", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._listens, what=f"mosquitto; log: {self.log_path}")

    def stop(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(10)

    def log(self) -> str:
        """What it logged so far."""
        return self.log_path.read_text()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@contextlib.contextmanager
def mosquitto(directory: Path, settings: str = "allow_anonymous true") -> Iterator[Mosquitto]:
    """A running broker, ended whatever happens."""
    broker = Mosquitto(directory, settings)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()
