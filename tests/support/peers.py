"""Other people's programs as real processes: openssl, Node, GnuTLS, Mosquitto; and a wire tap between two of them.

A program that is not installed skips the test that asks for it, visibly; with `CI` in the environment it fails it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

import pytest

from tests.support.gateway import Device, wait_for
from tests.support.services import unused_port

__all__ = [
    "ALERT",
    "CLOSE_NOTIFY",
    "Mosquitto",
    "Peer",
    "Record",
    "Side",
    "Version",
    "WireTap",
    "gnutls_cli",
    "mosquitto_pub",
    "mosquitto_sub",
    "node",
    "openssl",
    "openssl_knows",
    "plain_mosquitto_sub",
    "program",
    "s_client",
    "s_server",
]

ANSWER_S: Final = 10.0
"""How long a program may take to say what is expected of it."""
PACKAGES: Final = {
    "openssl": "openssl",
    "node": "nodejs",
    "gnutls-cli": "gnutls-bin",
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "mosquitto_sub": "mosquitto-clients",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "tshark": "tshark",
    "go": "golang-go",
    "haproxy": "haproxy",
    "nginx": "libnginx-mod-stream",
    "systemd-analyze": "systemd",
    "psktool": "gnutls-bin",
    "stunnel4": "stunnel4",
}
"""Where Debian has them."""


def program(name: str) -> str:
    """The path of a program, if need be from where Debian keeps servers."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        missing = f"{name} is not installed: apt-get install {PACKAGES[name]}"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path


class Peer:
    """A running program that is talked to. Its stdout and stderr are one text, `output`."""

    def __init__(self, *command: object, environment: Mapping[str, str] | None = None) -> None:
        self.command = [str(part) for part in command]
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=os.environ | (environment or {}),
        )
        self._received = bytearray()
        self._expected_to = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    @property
    def output(self) -> str:
        """All that it printed, as far as `expect` and `ended` have read it."""
        return self._received.decode("utf-8", "replace").replace("\r\n", "\n")

    def send(self, text: str) -> None:
        """Write to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())

    def expect(self, pattern: str, timeout_s: float = ANSWER_S) -> re.Match[str]:
        r"""Wait for output that matches, behind what was expected before; `^` and `$` are of lines.

        What has just come may end anywhere, so a pattern that ends in `\d+$` may see half a number: end it with a line break.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            output = self.output
            found = re.compile(pattern, re.MULTILINE).search(output, self._expected_to)
            if found is not None:
                self._expected_to = found.end()
                return found
            assert self._read(deadline), f"no {pattern!r} within {timeout_s} s:\n{self.command}\n{output}"

    def end_input(self) -> None:
        """The end of its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def ended(self, timeout_s: float = ANSWER_S) -> int:
        """Wait for its end; its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        assert time.monotonic() < deadline, f"not ended within {timeout_s} s:\n{self.command}\n{self.output}"
        return self._process.wait(timeout_s)

    def finish(self, timeout_s: float = ANSWER_S) -> int:
        """End its stdin and wait for its end; its exit status."""
        self.end_input()
        return self.ended(timeout_s)

    def _read(self, deadline: float) -> bool:
        """Take more output; False when there is none before the deadline, or none to come."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        data = self._process.stdout.read(65536) if ready else b""
        self._received += data or b""
        return bool(data)


# OpenSSL


def openssl(*args: object) -> subprocess.CompletedProcess[str]:
    """One command of openssl that ends by itself."""
    return subprocess.run(
        [program("openssl"), *map(str, args)], capture_output=True, text=True, timeout=ANSWER_S, check=False
    )


@functools.cache
def openssl_knows(suite: str) -> bool:
    """Whether this openssl has a TLS 1.2 PSK suite."""
    return suite in openssl("ciphers", "-s", "-psk", "-tls1_2", suite).stdout.split(":")[0]


def s_client(port: int, device: Device | None, *options: object) -> Peer:
    """`openssl s_client` as that device, or without a PSK."""
    psk = () if device is None else ("-psk_identity", device.identity, "-psk", device.key)
    return Peer(program("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *psk, *options)


@contextlib.contextmanager
def s_server(device: Device | None, *options: object) -> Iterator[int]:
    """`openssl s_server` as somebody else's server, that knows that device or speaks without PSK; its port."""
    psk = () if device is None else ("-nocert", "-psk_identity", device.identity, "-psk", device.key)
    with Peer(program("openssl"), "s_server", "-accept", "127.0.0.1:0", *psk, *options) as server:
        yield int(server.expect(r"^ACCEPT 127\.0\.0\.1:(\d+)\n").group(1))


# Node

NODE_CLIENT: Final = Path(__file__).with_name("node_client.js")


def node(port: int, device: Device, **options: Any) -> Peer:
    """Node's `tls.connect` as that device, with these options of Node; `node_client.js` says what it prints."""
    return Peer(program("node"), NODE_CLIENT, port, device.identity, device.key, json.dumps(options))


# GnuTLS


def gnutls_cli(port: int, device: Device, priority: str) -> Peer:
    """`gnutls-cli` as that device."""
    return Peer(
        program("gnutls-cli"), "--port", port, "--no-ca-verification", "--priority", priority,
        "--pskusername", device.identity, "--pskkey", device.key, "127.0.0.1",
    )  # fmt: skip


# Mosquitto

Version = Literal["TLSv1.2", "TLSv1.3"]
BY_LINES: Final = ("stdbuf", "--output=L")
"""Of coreutils: without it a C program whose stdout is no terminal says nothing before its end."""


class Mosquitto:
    """A broker without TLS on an ephemeral port of the loopback."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log_path = directory / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        path = program("mosquitto")
        for _ in range(5):  # Mosquitto cannot be given port 0, and a free one may be taken meanwhile
            self.port = unused_port()
            config = self._directory / "mosquitto.conf"
            config.write_text(
                f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\nlog_type all\n"
            )
            with self._log_path.open("wb") as log:
                process = subprocess.Popen([path, "-c", config], stdin=subprocess.DEVNULL, stderr=log)
            if wait_for(functools.partial(self._state_of, process), what="Mosquitto") == "ready":
                self._process = process
                return self
        raise AssertionError(f"Mosquitto does not start: {self.log()}")

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(ANSWER_S)

    def log(self) -> str:
        """What the broker said."""
        return self._log_path.read_text()

    def _state_of(self, process: subprocess.Popen[bytes]) -> Literal["ready", "ended"] | None:
        if process.poll() is not None:
            return "ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return "ready"
        return None


def plain_mosquitto_sub(broker: Mosquitto, *options: object) -> Peer:
    """`mosquitto_sub` straight at a broker."""
    return Peer(*BY_LINES, program("mosquitto_sub"), "-d", "-h", "127.0.0.1", "-p", broker.port, *options)


def mosquitto_sub(port: int, device: Device, *options: object, highest: Version = "TLSv1.3") -> Peer:
    """`mosquitto_sub` as that device; with -d, so that it tells when it is subscribed."""
    command = (*BY_LINES, program("mosquitto_sub"), "-d", *_mosquitto(port, device))
    return Peer(*command, *options, environment=_up_to(highest))


def mosquitto_pub(port: int, device: Device, *options: object, highest: Version = "TLSv1.3") -> Peer:
    """`mosquitto_pub` as that device."""
    command = (program("mosquitto_pub"), "-d", *_mosquitto(port, device))
    return Peer(*command, *options, environment=_up_to(highest))


def _mosquitto(port: int, device: Device) -> tuple[object, ...]:
    return ("-h", "127.0.0.1", "-p", port, "--psk", device.key, "--psk-identity", device.identity)


def _up_to(highest: Version) -> dict[str, str]:
    """Their `--tls-version` is the lowest that they speak; the highest is OpenSSL's to say."""
    return {} if highest == "TLSv1.3" else {"OPENSSL_CONF": str(Path(__file__).with_name("tls12.cnf"))}


# The wire

Side = Literal["device", "gateway"]
ALERT: Final = 21
CLOSE_NOTIFY: Final = {"TLSv1.2": (21, 8 + 2 + 16), "TLSv1.3": (23, 2 + 1 + 16)}
"""Type and length of a record that holds an encrypted close_notify, under AES-GCM: nonce and tag, content type and tag."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One TLS record as it went over the wire."""

    side: Side
    kind: int
    data: bytes
    """with its header of 5 bytes"""

    @property
    def size(self) -> int:
        """Bytes behind the header."""
        return len(self.data) - 5


class WireTap:
    """A TCP proxy in front of a port, for one connection, that keeps what went over the wire, in order."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(ANSWER_S)
        self.port: int = self._listener.getsockname()[1]
        self._pieces: list[tuple[Side, bytes]] = []
        self.gateway_end: Literal["", "fin", "reset"] = ""
        """How the gateway ended its direction."""
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()

    def records(self, side: Side | None = None) -> list[Record]:
        """What both or one side sent, to be read when the connection is over. A record counts where it ends."""
        self._thread.join()
        found: list[Record] = []
        rest: dict[Side, bytes] = {"device": b"", "gateway": b""}
        for sender, piece in self._pieces:
            data = rest[sender] + piece
            while len(data) >= 5 and len(data) >= 5 + int.from_bytes(data[3:5]):
                size = 5 + int.from_bytes(data[3:5])
                found.append(Record(sender, data[0], data[:size]))
                data = data[size:]
            rest[sender] = data
        assert not any(rest.values()), f"the wire ended inside a record: {rest}"
        return [record for record in found if side in (None, record.side)]

    def pieces(self) -> list[tuple[Side, bytes]]:
        """What went over the wire, as it was read, when the connection is over."""
        self._thread.join()
        return self._pieces

    def _run(self) -> None:
        try:
            device, _ = self._listener.accept()
        except TimeoutError:
            return  # nobody came; the test that finds no records says so
        with device, socket.create_connection(("127.0.0.1", self._target)) as gateway:
            targets: dict[socket.socket, tuple[Side, socket.socket]] = {
                device: ("device", gateway),
                gateway: ("gateway", device),
            }
            while targets:
                for source in select.select(targets, [], [])[0]:
                    if not self._carry(source, *targets[source]):
                        del targets[source]

    def _carry(self, source: socket.socket, side: Side, target: socket.socket) -> bool:
        try:
            data = source.recv(65536)
        except ConnectionResetError:
            data = b""
            if side == "gateway":
                self.gateway_end = "reset"
        if data:
            self._pieces.append((side, data))
        elif side == "gateway":
            self.gateway_end = self.gateway_end or "fin"
        with contextlib.suppress(OSError):  # the other side is gone; what this one says is kept all the same
            if data:
                target.sendall(data)
            else:
                target.shutdown(socket.SHUT_WR)
        return bool(data)
