"""Messages on open sessions beside Mosquitto, the case `messages` of the suite.

100 bytes and 1 KB over TLS 1.2 PSK-AES128-GCM-SHA256, acknowledged, pipelined: the gateway spooled and direct, to `file` and to batched
`http`; Mosquitto with QoS 1, with and without a subscriber over PSK. Each case is given to all of them, one directly after
the other and in changing order. CPU is that of the server's whole process tree, until the last message is delivered. Then
the latency from a device's sending to its acknowledgement at half the load that the server took, also with a slow fsync.
"""

import getpass
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import fleet
from bench.errors import BenchError
from bench.generator import compiled
from bench.node import Gateway
from bench.peers import Running, free_port, program, stopped_on_failure, wait_for_port
from bench.plan import PEER_DEVICES, SMALL_FLEET
from bench.processes import Server, pinned, start_server
from bench.registry import REALM
from bench.suite import Suite, in_turns

_START_S = 20.0
_DELIVERED_S = 60.0
_SETTLE_S = 0.2
"""Then what was delivered is also deleted from the spool."""
_WINDOW = 200
"""Unanswered messages of each connection: what the gateway takes of one is 256."""
_ROUTES = ("spooled-file", "spooled-http", "direct-file", "direct-http")
MOSQUITTO, SUBSCRIBED = "Mosquitto, no subscriber", "Mosquitto, one subscriber"
LATENCY = "100 bytes at half the load"
SLOW = ", fsync 20 ms slower"


@dataclass(frozen=True)
class Load:
    """One burst."""

    clients: int
    size: int
    count: int
    rate: int = 0
    """Messages per second; 0: as fast as they are acknowledged."""


_FULL = (Load(8, 100, 100_000), Load(64, 100, 99_968), Load(8, 1000, 50_000), Load(64, 1000, 49_984))
_QUICK = (Load(64, 100, 12_800),)


@dataclass(frozen=True)
class Result:
    """What one burst was to a server and to the generator."""

    cpu_us: float
    """Of the server's process tree, per message."""
    per_s: float
    """Acknowledged."""
    generator_busy: float
    server_busy: float
    p50_us: int
    p99_us: int


@dataclass(frozen=True)
class Target:
    """Somebody who takes messages."""

    name: str
    server: Server
    address: str
    options: tuple[str, ...]
    delivered: Callable[[], int]
    """How many have come to the backend, ever."""


# Servers


class MessageGateway(Gateway):
    """One gateway with a listener and a route of each kind."""

    def __init__(self, suite: Suite, folder: Path, *, preload: str = "") -> None:
        super().__init__(folder, suite.node(SMALL_FLEET), suite.servers, suite.root)
        self.ports = {route: free_port() for route in _ROUTES}
        self.sink_port = free_port()
        self.preload = preload
        self.folder = folder

    def _environment(self, port: int, admin_port: int) -> dict[str, str]:
        listeners = [
            {"name": route, "bind": f"127.0.0.1:{self.ports[route]}", "realm": REALM, "profile": "compatible"}
            for route in _ROUTES
        ]
        listeners.append({"name": "tls", "bind": f"127.0.0.1:{port}", "realm": REALM})
        routes = [
            {
                "name": route,
                "match": {"listener": route},
                "framing": "lines",
                "delivery": route.partition("-")[0],
                "content_type": "text/plain",
                "backend": route if route.endswith("file") else "http",
            }
            for route in _ROUTES
        ]
        backends: dict[str, dict[str, str]] = {
            route: {"kind": "file", "path": str(self.output(route))}
            for route in _ROUTES
            if route.endswith("file")
        }
        backends["http"] = {"kind": "http", "url": f"http://127.0.0.1:{self.sink_port}/"}
        return {
            **super()._environment(port, admin_port),
            "PSKGW_LISTENERS": json.dumps(listeners),
            "PSKGW_ROUTES": json.dumps(routes),
            "PSKGW_BACKENDS": json.dumps(backends),
            **({"LD_PRELOAD": self.preload} if self.preload else {}),
        }

    def output(self, route: str) -> Path:
        """The file of a route."""
        return self.folder / f"{route}.jsonl"


class _Lines:
    """How many lines a growing file has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._lines = 0

    def __call__(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while piece := file.read(1 << 20):
                    self._lines += piece.count(b"\n")
                    self._offset += len(piece)
        return self._lines


def _count_of_sink(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
        return int(answer.read())


@contextmanager
def _gateway(suite: Suite, name: str, preload: str = "") -> Iterator[list[Target]]:
    folder = suite.scratch / name
    gateway = MessageGateway(suite, folder, preload=preload)
    with ExitStack() as stack:
        sink = start_server(
            [sys.executable, "-m", "bench.sink", str(gateway.sink_port)],
            log=folder / "sink.log",
            cpus=suite.load,
            cwd=suite.root,
        )
        stack.callback(sink.stop)
        wait_for_port(sink, gateway.sink_port, _START_S)
        running: Running = gateway.start()
        stack.callback(running.server.stop)
        yield [
            Target(
                route,
                running.server,
                f"127.0.0.1:{gateway.ports[route]}",
                (),
                _Lines(gateway.output(route))
                if route.endswith("file")
                else lambda: _count_of_sink(gateway.sink_port),
            )
            for route in _ROUTES
        ]


@contextmanager
def _mosquitto(folder: Path, servers: frozenset[int]) -> Iterator[list[Target]]:
    folder.mkdir()
    port = free_port()
    psk_file = folder / "psk"
    fleet.write_psk_file(psk_file, PEER_DEVICES)
    configuration = folder / "mosquitto.conf"
    configuration.write_text(
        f"listener {port} 127.0.0.1\npsk_hint bench\npsk_file {psk_file}\nuse_identity_as_username true\n"
        "tls_version tlsv1.2\nallow_anonymous true\npersistence true\n"
        f"persistence_location {folder}/\nmax_inflight_messages 0\nmax_queued_messages 0\nset_tcp_nodelay true\n"
        f"max_connections -1\nconnection_messages false\nlog_dest stderr\nlog_type error\nuser {getpass.getuser()}\n"
    )
    server = start_server(
        [program("mosquitto"), "-c", str(configuration)], log=folder / "log", cpus=servers, cwd=folder
    )
    try:
        with stopped_on_failure(server):
            wait_for_port(server, port, _START_S)
        address = f"127.0.0.1:{port}"
        yield [
            Target(SUBSCRIBED, server, address, ("--mqtt", "--subscribe"), lambda: 0),
            Target(MOSQUITTO, server, address, ("--mqtt",), lambda: 0),
        ]
    finally:
        server.stop()


# Measuring


class Generator:
    """The compiled messages.c, on a core of its own."""

    def __init__(self, executable: Path, cpus: frozenset[int]) -> None:
        self._executable = executable
        self._cpus = cpus

    def burst(self, target: Target, load: Load) -> Result:
        """Send, and wait until everything is delivered."""
        arguments = [
            *("--connect", target.address, "--clients", load.clients, "--count", load.count),
            *("--size", load.size, "--window", _WINDOW, *(("--rate", load.rate) if load.rate else ())),
        ]
        delivered = target.delivered()
        with pinned(self._cpus):
            process = subprocess.Popen(
                [self._executable, *map(str, arguments), *target.options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise BenchError(f"the generator could not open its connections to {target.name}")
            cpu_s = target.server.cpu_s()
            output, _ = process.communicate("\n", timeout=180)
        finally:
            process.kill()
        if process.returncode != 0:
            raise BenchError(f"messages failed at {target.name}")
        measured = json.loads(output)
        busy_s = target.server.cpu_s() - cpu_s
        self._await_delivery(target, delivered + load.count)
        time.sleep(_SETTLE_S)
        cpu_s = target.server.cpu_s() - cpu_s
        return Result(
            cpu_s / load.count * 1e6,
            load.count / measured["wall_s"],
            1 - measured["idle_s"] / measured["wall_s"],
            busy_s / measured["wall_s"],
            measured["p50_us"],
            measured["p99_us"],
        )

    @staticmethod
    def _await_delivery(target: Target, count: int) -> None:
        if "--mqtt" in target.options:
            return  # the generator is the subscriber
        deadline = time.monotonic() + _DELIVERED_S
        while (found := target.delivered()) < count:
            if time.monotonic() > deadline:
                raise BenchError(f"{target.name}: {count - found} messages were not delivered")
            time.sleep(0.02)


def run(suite: Suite) -> None:
    """The whole case; the quick form has one load and no latencies."""
    generator = Generator(
        compiled(suite.root / "bench" / "messages.c", suite.build, "-lssl", "-lcrypto"), suite.load
    )
    slow = compiled(suite.root / "bench" / "slow_fsync.c", suite.build, "-shared", "-fPIC", "-ldl")
    with ExitStack() as stack:
        ours = stack.enter_context(_gateway(suite, "gateway"))
        theirs = stack.enter_context(_mosquitto(suite.scratch / "mosquitto", suite.servers))
        _bursts(suite, generator, [*ours, *theirs])
        if not suite.quick:
            _latencies(suite, generator, [*ours, *theirs], 60_000, "")
    if not suite.quick:
        with _gateway(suite, "slow", preload=str(slow)) as slowed:
            buffered = [each for each in slowed if each.name != "direct-http"]
            _latencies(suite, generator, buffered, 15_000, SLOW)


def _bursts(suite: Suite, generator: Generator, targets: Sequence[Target]) -> None:
    for load in suite.pick(_FULL, _QUICK):
        for number in range(-1, suite.rounds):  # the first warms up
            for target in in_turns(number, targets):
                suite.say(f"{target.name}: {load.size} bytes, {load.clients} clients, round {number + 1}")
                result = generator.burst(target, load)
                if number >= 0:
                    figures = {
                        "message_us": result.cpu_us,
                        "per_s": result.per_s,
                        "server_busy": result.server_busy,
                        "generator_busy": result.generator_busy,
                    }
                    suite.record.add(f"{load.size} bytes", load.clients, target.name, figures)


def _latencies(
    suite: Suite, generator: Generator, targets: Sequence[Target], count: int, suffix: str
) -> None:
    """At half the load that each took just before."""
    for target in targets:
        suite.say(f"{target.name}: latency at half the load")
        full = generator.burst(target, Load(64, 100, count // 64 * 64))
        rate = int(full.per_s / 2)
        half = generator.burst(
            target, Load(64, 100, max(64, min(rate * 3, count * 10 // 3) // 64 * 64), rate)
        )
        figures = {
            "per_s": float(rate),
            "p50_us": float(half.p50_us),
            "p99_us": float(half.p99_us),
            "generator_busy": half.generator_busy,
        }
        suite.record.add(f"{LATENCY}{suffix}", 64, target.name, figures)
