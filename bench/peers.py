"""Servers under test: what runs beside the gateway, and what they all have in common."""

import getpass
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench import fleet
from bench.errors import BenchError
from bench.plan import Work
from bench.processes import Server, start_server

_START_S = 20.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts connections."""

    name: str
    address: str
    devices: int
    """Devices 0 to devices - 1 of the fleet may connect."""
    works: frozenset[Work]
    server: Server


class Peer(Protocol):
    """A server that can be started and measured."""

    @property
    def name(self) -> str: ...

    @property
    def works(self) -> frozenset[Work]:
        """What it can be measured at."""

    def start(self) -> Running:
        """Start a fresh one and wait until it accepts; what is left to do is `Running.server.stop()`."""

    def versions(self) -> Mapping[str, str]:
        """What it is built from, for the report."""


@contextmanager
def stopped_on_failure(server: Server) -> Iterator[None]:
    """Around the wait for a server that was just started."""
    try:
        yield
    except BaseException:  # an interrupt too
        server.stop()
        raise


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    started = peer.start()
    try:
        yield started
    finally:
        started.server.stop()


class Mosquitto:
    """Mosquitto with a psk_file; connections end after the handshake, without MQTT.

    It logs errors only, which makes it a little faster than as it comes. As of 2.0.11 `tls_version tlsv1.2` means "at
    least": TLS 1.3 clients get TLS 1.3 with their PSK.
    """

    name = "Mosquitto"
    works = frozenset({Work.HANDSHAKE})

    def __init__(self, folder: Path, devices: int, cpus: frozenset[int]) -> None:
        self._folder = folder
        self._devices = devices
        self._cpus = cpus
        self._program = program("mosquitto")

    def start(self) -> Running:
        port = free_port()
        psk_file = self._folder / "mosquitto.psk"
        configuration = self._folder / "mosquitto.conf"
        fleet.write_psk_file(psk_file, self._devices)
        configuration.write_text(
            f"listener {port} 127.0.0.1\n"
            "psk_hint bench\n"
            f"psk_file {psk_file}\n"
            "use_identity_as_username true\n"
            "tls_version tlsv1.2\n"
            "allow_anonymous true\n"
            "persistence false\n"
            "max_connections -1\n"
            "connection_messages false\n"
            "log_dest stderr\n"
            "log_type error\n"
            # As root it would become another user, who may not read the files above.
            f"user {getpass.getuser()}\n"
        )
        server = start_server(
            [self._program, "-c", str(configuration)],
            log=self._folder / "mosquitto.log",
            cpus=self._cpus,
            cwd=self._folder,
        )
        with stopped_on_failure(server):
            wait_for_port(server, port, _START_S)
        return Running(self.name, f"127.0.0.1:{port}", self._devices, self.works, server)

    def versions(self) -> Mapping[str, str]:
        said = subprocess.run([self._program, "-h"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version (\S+)", said)
        return {"Mosquitto": version.group(1) if version else "unknown"}


def program(name: str) -> str:
    """The path of a program, also where Debian keeps servers; raises BenchError."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BenchError(f"{name} is not installed: install the package {name}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(server: Server, port: int, timeout_s: float) -> None:
    """Wait until somebody accepts on 127.0.0.1:port; raises BenchError when `server` ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        server.check_alive()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise BenchError(f"no answer on port {port} after {timeout_s:.0f} s: {server.last_words()}")
