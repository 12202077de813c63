"""Stream routes beside stunnel in server mode, in front of the same echo service."""

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.generator import Load, compiled
from bench.node import Gateway, stream_settings
from bench.peers import Running, Stunnel, echo_service, running
from bench.plan import PEER_DEVICES, PSK_GCM, SMALL_FLEET, SUITES, Work
from bench.processes import pinned
from bench.suite import SETTLE_S, Suite, in_turns

CONNECT = "{}, one round trip of 64 bytes"
TRIPS = "100-byte round trips on open connections"
BULK = "16 KiB writes on one connection, echoed"
_FULL = ((1, 500), (8, 2000), (64, 4000))
_QUICK = ((1, 100), (8, 200), (64, 400))
_OPEN = 50
_WRITE_BYTES = 16 * 1024
_BULK_WINDOW_BYTES = 64 * _WRITE_BYTES
_RUN_S_MAX = 300


@dataclass(frozen=True, slots=True)
class Stream:
    """What stream.c is asked for; sizes in bytes, `bytes_each` and `window` of each connection."""

    clients: int
    bytes_each: int
    write: int
    window: int

    def arguments(self, address: str) -> list[str]:
        sizes = {
            "clients": self.clients,
            "bytes": self.bytes_each,
            "write": self.write,
            "window": self.window,
        }
        options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
        return ["--connect", address, *options, "--hold"]


def run(suite: Suite) -> None:
    node = suite.node(SMALL_FLEET)
    executable = compiled(suite.root / "bench" / "echo.c", suite.build)
    with ExitStack() as stack:
        service = stack.enter_context(echo_service(executable, suite.scratch, suite.load))
        peers = (
            Gateway(
                suite.scratch / "gateway", node, suite.servers, suite.root, settings=stream_settings(service)
            ),
            Stunnel(suite.scratch / "stunnel", PEER_DEVICES, suite.servers, service),
        )
        for peer in peers:
            suite.record.versions.update(peer.versions())
        servers = [stack.enter_context(running(peer)) for peer in peers]
        for number in range(-1, suite.rounds):  # the first warms up
            _round(suite, number, servers)


def _round(suite: Suite, number: int, servers: list[Running]) -> None:
    connect = suite.generator(awake=False)  # the echo service shares its core
    for cipher in SUITES:
        for clients, connections in suite.pick(_FULL, _QUICK if cipher is PSK_GCM else _QUICK[-1:]):
            for server in in_turns(number, servers):
                count = connections if number >= 0 else 50
                load = Load(server.address, cipher, clients, count, 0, server.devices, Work.ECHO)
                if number < 0:
                    connect.run(load)
                else:
                    suite.handshakes(connect, CONNECT.format(cipher.label), server, load)
    trips = suite.pick(80_000, 10_000) // _OPEN * 100
    bulk = suite.pick(1024, 64) * 1024 * 1024
    if number < 0:
        trips, bulk = trips // 10, bulk // 16
    for server in in_turns(number, servers):
        for row, stream in (
            (TRIPS, Stream(_OPEN, trips, 100, 100)),
            (BULK, Stream(1, bulk, _WRITE_BYTES, _BULK_WINDOW_BYTES)),
        ):
            suite.say(f"{server.name}: {row}")
            figures = _bytes(suite, server, stream)
            each_us = figures.pop("write_us")
            figures |= {"trip_us": each_us} if row == TRIPS else {"gb_s": each_us / _WRITE_BYTES * 1e3}
            if number >= 0:
                suite.record.add(row, stream.clients, server.name, figures)


def _bytes(suite: Suite, running: Running, stream: Stream) -> dict[str, float]:
    """CPU per write, and the rest."""
    server = running.server
    with streaming(suite, running.address, stream) as process:
        cpu_s, starved_s = server.cpu_s(), server.starved_s()
        measured = finish(process)
        time.sleep(SETTLE_S)
        server.check_alive()
        cpu_s, starved_s = server.cpu_s() - cpu_s, server.starved_s() - starved_s
    return {
        "write_us": cpu_s / measured["count"] * 1e6,
        **{name: float(measured[name]) for name in ("p50_us", "p99_us", "p999_us")},
        "server_busy": (cpu_s + starved_s) / measured["wall_s"],
        "generator_busy": 1 - measured["idle_s"] / measured["wall_s"],
    }


@contextmanager
def streaming(suite: Suite, address: str, stream: Stream) -> Iterator["subprocess.Popen[str]"]:
    """stream.c with its connections open, which stay so until the block ends; `finish` makes it run."""
    executable = compiled(suite.root / "bench" / "stream.c", suite.build, "-lssl", "-lcrypto")
    with opened(executable, stream.arguments(address), suite.load) as process:
        yield process


@contextmanager
def opened(executable: Path, arguments: list[str], cpus: frozenset[int]) -> Iterator["subprocess.Popen[str]"]:
    """A generator that has opened its connections, waits for a line to begin, and for the end of its input to end."""
    with pinned(cpus):
        process = subprocess.Popen(
            [executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        _line(process)
        yield process
        process.communicate(timeout=_RUN_S_MAX)
    finally:
        process.kill()
        process.wait()


def finish(process: "subprocess.Popen[str]") -> Mapping[str, Any]:
    """Let it run, and give what it measured."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return _line(process)


def _line(process: "subprocess.Popen[str]") -> Mapping[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise BenchError(f"connections failed under load: {process.stderr.read().strip().splitlines()[-1:]}")
    parsed: Mapping[str, Any] = json.loads(line)
    return parsed
