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
from bench.processes import Server, start_server

MOSQUITTO = "Mosquitto"
STUNNEL = "stunnel"
_START_S = 20.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts connections."""

    name: str
    address: str
    devices: int
    """Devices 0 to devices - 1 of the fleet may connect."""
    server: Server


class Peer(Protocol):
    """A server that can be started and measured."""

    @property
    def name(self) -> str: ...

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

    def __init__(self, folder: Path, devices: int, cpus: frozenset[int], *, name: str = MOSQUITTO) -> None:
        """`folder` is made, and is this one's alone."""
        folder.mkdir(exist_ok=True)
        self.name = name
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
        return Running(self.name, f"127.0.0.1:{port}", self._devices, server)

    def versions(self) -> Mapping[str, str]:
        said = subprocess.run([self._program, "-h"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version (\S+)", said)
        return {"Mosquitto": version.group(1) if version else "unknown"}


class Stunnel:
    """stunnel in server mode, in front of a TCP service on this machine."""

    name = STUNNEL

    def __init__(self, folder: Path, devices: int, cpus: frozenset[int], service_port: int) -> None:
        """`folder` is made, and is this one's alone."""
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._devices = devices
        self._cpus = cpus
        self._service_port = service_port
        self._program = program("stunnel4")

    def start(self) -> Running:
        port = free_port()
        secrets, configuration = self._folder / "secrets", self._folder / "stunnel.conf"
        fleet.write_psk_file(secrets, self._devices)
        configuration.write_text(
            "foreground = yes\npid =\ndebug = err\n"
            f"[psk]\naccept = 127.0.0.1:{port}\nconnect = 127.0.0.1:{self._service_port}\n"
            f"PSKsecrets = {secrets}\n"
            "ciphers = PSK-AES128-GCM-SHA256:ECDHE-PSK-CHACHA20-POLY1305\n"
            "ciphersuites = TLS_AES_128_GCM_SHA256\n"
            "sslVersionMin = TLSv1.2\nsessionResume = no\n"
            # So that no record waits for the acknowledgement of the one before.
            "socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
        )
        server = start_server(
            [self._program, str(configuration)],
            log=self._folder / "stunnel.log",
            cpus=self._cpus,
            cwd=self._folder,
        )
        with stopped_on_failure(server):
            wait_for_port(server, port, _START_S)
        return Running(self.name, f"127.0.0.1:{port}", self._devices, server)

    def versions(self) -> Mapping[str, str]:
        said = subprocess.run([self._program, "-version"], capture_output=True, text=True, check=False)
        version = re.search(r"stunnel (\S+)", said.stdout + said.stderr)
        return {"stunnel": version.group(1) if version else "unknown"}


@contextmanager
def echo_service(executable: Path, folder: Path, cpus: frozenset[int]) -> Iterator[int]:
    """echo.c as a service; gives its port."""
    port = free_port()
    server = start_server([str(executable), str(port)], log=folder / "echo.log", cpus=cpus, cwd=folder)
    try:
        wait_for_port(server, port, _START_S)
        yield port
    finally:
        server.stop()


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
