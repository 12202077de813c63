"""`gatewayctl tunnel` beside stunnel in client mode: `python -m bench.tunnel`.

Both carry plain TCP to the same TLS-PSK server (stunnel in server mode, which decides the suite) with an echo service behind it, one
directly after the other in each round and in changing order, pinned to a core of their own. Measured is the CPU time of
the tunnel alone. Nothing resumes sessions: `gatewayctl tunnel` never does, and the server is told not to.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import describe_machine, revision
from bench.peers import free_port, program, wait_for_port
from bench.processes import Server, start_server

_ROOT = Path(__file__).parents[1]
_IDENTITY = "bench"
_KEY = bytes(range(32)).hex()
_START_S = 20.0
_PIECE = 16 * 1024
_SUITES = {"TLSv1.2": "PSK-AES128-GCM-SHA256", "TLSv1.3": "TLS_AES_128_GCM_SHA256"}


@dataclass(frozen=True)
class Size:
    """How much work one sample is."""

    connections: int
    clients: int
    round_trips: int
    open_connections: int
    bulk_bytes: int
    idle: int


FULL = Size(4000, 16, 40_000, 50, 512 * 1024 * 1024, 500)
QUICK = Size(400, 16, 4000, 50, 32 * 1024 * 1024, 100)


@dataclass(frozen=True)
class Tunnel:
    """One under test."""

    name: str
    port: int
    server: Server


def connect_and_echo(port: int, size: Size) -> int:
    """Connections with one round trip of 64 bytes each; how many."""

    def work(count: int) -> None:
        for _ in range(count):
            with _connection(port) as connection:
                _round_trip(connection, bytes(64))

    _in_threads(work, size.clients, size.connections // size.clients)
    return size.connections // size.clients * size.clients


def small_round_trips(port: int, size: Size) -> int:
    """Round trips of 100 bytes on open connections; how many."""

    def work(count: int) -> None:
        with _connection(port) as connection:
            for _ in range(count):
                _round_trip(connection, bytes(100))

    _in_threads(work, size.open_connections, size.round_trips // size.open_connections)
    return size.round_trips


def bulk(port: int, size: Size) -> int:
    """One connection, everything echoed; how many MB went out (and as many came back)."""
    with _connection(port) as connection:
        sender = threading.Thread(target=_send, args=(connection, size.bulk_bytes))
        sender.start()
        _receive(connection, size.bulk_bytes)
        sender.join()
    return size.bulk_bytes // 1_000_000


WORKS: Sequence[tuple[str, str, Callable[[int, Size], int], float]] = (
    ("connect, handshake, 64 bytes echoed, close", "us per connection", connect_and_echo, 1e6),
    ("100 bytes echoed on open connections", "us per round trip", small_round_trips, 1e6),
    ("16 KiB writes, echoed", "ms per MB", bulk, 1e3),
)


def _connection(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _round_trip(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    _receive(connection, len(data))


def _send(connection: socket.socket, size: int) -> None:
    piece = bytes(_PIECE)
    for _ in range(size // _PIECE):
        connection.sendall(piece)


def _receive(connection: socket.socket, size: int) -> None:
    buffer = bytearray(256 * 1024)
    while size:
        received = connection.recv_into(buffer, min(size, len(buffer)))
        if not received:
            raise ConnectionError("the tunnel closed the connection")
        size -= received


def _in_threads(work: Callable[[int], None], threads: int, count: int) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(count)
        except BaseException as exc:  # noqa: BLE001 -- raised again below
            errors.append(exc)

    started = [threading.Thread(target=run) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def _tunnels(folder: Path, version: str) -> Iterator[list[Tunnel]]:
    """Both tunnels and what is behind them, on cores of their own if there are two."""
    cores = sorted(os.sched_getaffinity(0))
    measured, others = frozenset(cores[:1]), frozenset(cores[1:] or cores)
    secrets = folder / "secrets"
    secrets.touch(0o600)
    secrets.write_text(f"{_IDENTITY}:{_KEY}\n")
    key = folder / "key"
    key.touch(0o600)
    key.write_text(_KEY)
    echo, tls, ours, theirs = (free_port() for _ in range(4))
    with ExitStack() as stack:

        def start(name: str, argv: list[str], port: int, cpus: frozenset[int]) -> Server:
            server = start_server(argv, log=folder / f"{name}.log", cpus=cpus, cwd=_ROOT)
            stack.callback(server.stop)
            wait_for_port(server, port, _START_S)
            return server

        def stunnel(name: str, port: int, text: str, cpus: frozenset[int]) -> Server:
            configuration = folder / f"{name}.conf"
            suites = "ciphers" if version == "TLSv1.2" else "ciphersuites"
            configuration.write_text(
                f"foreground = yes\npid =\ndebug = err\n[psk]\naccept = 127.0.0.1:{port}\nPSKsecrets = {secrets}\n"
                f"sslVersion = {version}\n{suites} = {_SUITES[version]}\n{text}"
            )
            return start(name, [program("stunnel4"), str(configuration)], port, cpus)

        start("echo", [sys.executable, "-m", "bench.echo", str(echo)], echo, others)
        stunnel("server", tls, f"connect = 127.0.0.1:{echo}\nsessionResume = no\n", others)
        client = f"client = yes\nconnect = 127.0.0.1:{tls}\nPSKidentity = {_IDENTITY}\n"
        argv = [
            sys.executable, "-m", "gateway", "tunnel", "--listen", f"127.0.0.1:{ours}", "--connect", f"127.0.0.1:{tls}",
            "--identity", _IDENTITY, "--key-file", str(key), "--tls", version.removeprefix("TLSv"),
        ]  # fmt: skip
        yield [
            Tunnel("gatewayctl tunnel", ours, start("tunnel", argv, ours, measured)),
            Tunnel("stunnel", theirs, stunnel("stunnel", theirs, client, measured)),
        ]


def _measure(tunnels: list[Tunnel], size: Size, rounds: int) -> Iterator[str]:
    """Lines of the table. Memory comes first, while it is fresh."""
    for tunnel in tunnels:
        _idle_kib(tunnel, 1)
    kib = [_idle_kib(tunnel, size.idle) for tunnel in tunnels]
    yield _row(f"{size.idle} idle connections, KiB each", kib[0], kib[1], kib[0] / kib[1])
    for number, (what, unit, work, scale) in enumerate(WORKS):
        figures: dict[str, list[float]] = {tunnel.name: [] for tunnel in tunnels}
        for tunnel in tunnels:
            work(tunnel.port, QUICK)  # warm up
        for turn in range(rounds):
            for tunnel in tunnels if (number + turn) % 2 == 0 else tunnels[::-1]:
                before = tunnel.server.cpu_s()
                count = work(tunnel.port, size)
                time.sleep(0.05)
                figures[tunnel.name].append((tunnel.server.cpu_s() - before) / count * scale)
        ours, theirs = (figures[tunnel.name] for tunnel in tunnels)
        ratio = statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))
        yield _row(f"{what}, {unit}", statistics.median(ours), statistics.median(theirs), ratio)


def _row(what: str, ours: float, theirs: float, ratio: float) -> str:
    return f"| {what} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |"


def _idle_kib(tunnel: Tunnel, count: int) -> float:
    """Resident memory of an idle connection over which 64 bytes have been echoed."""
    before = tunnel.server.memory().resident
    with ExitStack() as stack:
        for _ in range(count):
            _round_trip(stack.enter_context(_connection(tunnel.port)), bytes(64))
        time.sleep(0.5)
        return (tunnel.server.memory().resident - before) / 1024 / count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tunnel", description="The tunnel beside stunnel.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    options = parser.parse_args()
    for name, value in describe_machine().items():
        print(f"{name}: {value}")
    print(f"Revision: {revision(_ROOT)}")
    for version, suite in _SUITES.items():
        print(f"\n{version}, {suite}: CPU time of the tunnel, medians of {options.rounds} rounds\n")
        print("| work | gatewayctl tunnel | stunnel | ratio |\n|---|---|---|---|")
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as folder,
            _tunnels(Path(folder), version) as tunnels,
        ):
            for line in _measure(tunnels, QUICK if options.quick else FULL, options.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
