"""Messages on open sessions beside Mosquitto: `python -m bench.messages [--quick]`.

100 bytes and 1 KB over TLS 1.2 PSK-AES128-GCM-SHA256, acknowledged, pipelined: the gateway spooled and direct, to `file` and to batched
`http`; Mosquitto with QoS 1, with and without a subscriber over PSK. Each case is given to all of them, one directly after
the other and in changing order. CPU is that of the server's whole process tree, until the last message is delivered. Then
the latency from a device's sending to its acknowledgement at half the load that the server took, also with a slow fsync.
It replaces its own part of bench/RESULTS.md.
"""

import argparse
import getpass
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import fleet
from bench.errors import BenchError
from bench.generator import compiled
from bench.machine import describe_machine
from bench.node import Gateway
from bench.peers import Running, free_port, program, stopped_on_failure, wait_for_port
from bench.plan import QUICK as SMALL_REGISTRY
from bench.processes import Server, machine_busy_s, pinned, start_server
from bench.registry import REALM, prepare_node
from bench.report import replace_part

_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_BUILD = _HERE / "build"
_START_S = 20.0
_DELIVERED_S = 60.0
_QUIET = 0.05
"""Share of the machine that other programs may take."""
_SETTLE_S = 0.2
"""Then what was delivered is also deleted from the spool."""
_WINDOW = 200
"""Unanswered messages of each connection: what the gateway takes of one is 256."""
_CLIENTS = (8, 64)
_SIZES = (100, 1000)
_ROUTES = ("spooled-file", "spooled-http", "direct-file", "direct-http")
MOSQUITTO, SUBSCRIBED = "Mosquitto, no subscriber", "Mosquitto, one subscriber"
TITLE = "# Messages"


@dataclass(frozen=True)
class Load:
    """One burst."""

    clients: int
    size: int
    count: int
    rate: int = 0
    """Messages per second; 0: as fast as they are acknowledged."""


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

    def __init__(self, folder: Path, cpus: frozenset[int], *, preload: str = "") -> None:
        node = prepare_node(_BUILD, SMALL_REGISTRY.devices, lambda _: None)
        super().__init__(folder, node, cpus, _ROOT)
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
def _gateway(
    folder: Path, servers: frozenset[int], others: frozenset[int], preload: str = ""
) -> Iterator[list[Target]]:
    folder.mkdir()
    gateway = MessageGateway(folder, servers, preload=preload)
    with ExitStack() as stack:
        sink = start_server(
            [sys.executable, "-m", "bench.sink", str(gateway.sink_port)],
            log=folder / "sink.log",
            cpus=others,
            cwd=_ROOT,
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
    fleet.write_psk_file(psk_file, 1000)
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


def _load_cases(scale: float) -> list[Load]:
    return [
        Load(clients, size, int((100_000 if size == _SIZES[0] else 50_000) * scale) // clients * clients)
        for size in _SIZES
        for clients in _CLIENTS
    ]


def _measure(
    generator: Generator, targets: Sequence[Target], rounds: int, scale: float
) -> dict[tuple[Load, str], list[Result]]:
    results: dict[tuple[Load, str], list[Result]] = {}
    for load in _load_cases(scale):
        for turn in range(-1, rounds):  # the first is the warm-up
            for target in targets if turn % 2 == 0 else targets[::-1]:
                result = generator.burst(target, load)
                if turn >= 0:
                    results.setdefault((load, target.name), []).append(result)
    return results


def _latencies(generator: Generator, targets: Sequence[Target], scale: float) -> Iterator[Sequence[str]]:
    """Rows: at half the load that each took just before."""
    for target in targets:
        full = generator.burst(target, Load(64, 100, int(60_000 * scale) // 64 * 64))
        rate = int(full.per_s / 2)
        at_half = generator.burst(
            target, Load(64, 100, max(64, min(rate * 3, int(200_000 * scale)) // 64 * 64), rate)
        )
        yield (
            target.name,
            f"{rate:,}",
            f"{at_half.p50_us / 1000:.1f} / {at_half.p99_us / 1000:.1f}",
            f"{at_half.generator_busy:.0%}",
        )


# Report


def _ratio(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    return f"{statistics.median(a.cpu_us / b.cpu_us for a, b in zip(ours, theirs, strict=True)):.2f}x"


def _us(results: Sequence[Result]) -> str:
    values = [each.cpu_us for each in results]
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _cpu_rows(results: Mapping[tuple[Load, str], list[Result]]) -> Iterator[Sequence[str]]:
    for load in dict.fromkeys(load for load, _ in results):
        subscribed, alone = results[load, SUBSCRIBED], results[load, MOSQUITTO]
        for name in (*_ROUTES, SUBSCRIBED, MOSQUITTO):
            own = results[load, name]
            is_ours = name in _ROUTES
            yield (
                f"{load.size} B, {load.clients} clients",
                name,
                _us(own),
                _ratio(own, subscribed) if is_ours else "-",
                _ratio(own, alone) if is_ours else "-",
                f"{statistics.median(each.per_s for each in own):,.0f}",
                f"{statistics.median(each.server_busy for each in own):.0%}",
                f"{statistics.median(each.generator_busy for each in own):.0%}",
            )


_HEAD = """\
{title}

Written by `python -m bench.messages`{quick}; not edited. CPU is user and system time of the server's whole process tree, us per
message, until the last one is delivered (written to the file, answered by the HTTP server, with the subscriber): median of {rounds}
rounds, the range in brackets. Ratios are medians of the rounds' ratios. {window} messages of each connection are
unanswered at a time. The gateway has one worker, everything as shipped: spools with `sync = "full"`, files with `fsync = "batch"`, and a
route, listener and backend for each row in one process. Mosquitto: QoS 1, `persistence true`, which dumps what it holds every
half hour and when it ends, so what it acknowledges is in its memory alone; the subscriber has QoS 1 over PSK, on the generator's core.
The generator never sleeps; where it is busy less than all the time, it was not the limit. Programs outside of the benchmark took
{others:.0%} of the machine meanwhile{verdict}.

Target: spooled at most 1.0x of Mosquitto with one subscriber, 100 bytes.
"""
_LATENCY = """\
## Latency from send to acknowledgement

100 bytes, 64 clients, at half the messages per second that each took just before; ms, p50 / p99, counted from when a message
was due. With a slow fsync every fsync and fdatasync of the gateway takes 20 ms more (bench/slow_fsync.c).
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _own_s() -> float:
    """CPU time of this program and of all that it has started and seen end."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _report(
    head: str, machine: Mapping[str, str], cpu: Sequence[Sequence[str]], latency: Sequence[Sequence[str]]
) -> str:
    columns = (
        "load",
        "server",
        "us CPU",
        "of Mosquitto with subscriber",
        "of Mosquitto without",
        "acknowledged per s",
        "server busy",
        "generator busy",
    )
    return "\n".join(
        [
            head,
            _table(("what", "value"), list(machine.items())),
            "",
            "## CPU per message\n",
            _table(columns, cpu),
            "",
            _LATENCY,
            _table(("server", "messages per s", "p50 / p99, ms", "generator busy"), latency),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.messages", description="Messages beside Mosquitto."
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the messages")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--output", type=Path, default=_HERE / "RESULTS.md", metavar="FILE")
    options = parser.parse_args()
    try:
        part = _run(0.2 if options.quick else 1.0, options.rounds)
    except BenchError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    replace_part(options.output, TITLE, part)
    print(part)
    return 0


def _run(scale: float, rounds: int) -> str:
    _BUILD.mkdir(exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    servers, others = frozenset(cores[:-1] or cores), frozenset(cores[-1:])
    began_s, busy_s, own_s = time.monotonic(), machine_busy_s(), _own_s()
    generator = Generator(compiled(_HERE / "messages.c", _BUILD, "-lssl", "-lcrypto"), others)
    slow = compiled(_HERE / "slow_fsync.c", _BUILD, "-shared", "-fPIC", "-ldl")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=_BUILD) as scratch, ExitStack() as stack:
        folder = Path(scratch)
        ours = stack.enter_context(_gateway(folder / "gateway", servers, others))
        theirs = stack.enter_context(_mosquitto(folder / "mosquitto", servers))
        targets = [*ours, *theirs]
        cpu = list(_cpu_rows(_measure(generator, targets, rounds, scale)))
        latency = list(_latencies(generator, targets, scale))
        stack.close()
        with _gateway(folder / "slow", servers, others, preload=str(slow)) as slowed:
            rows = _latencies(generator, [each for each in slowed if each.name != "direct-http"], scale / 4)
            latency += [(f"{name}, slow fsync", *rest) for name, *rest in rows]
    others_s = machine_busy_s() - busy_s - (_own_s() - own_s)
    share = max(0.0, others_s / (time.monotonic() - began_s) / len(cores))
    head = _HEAD.format(
        others=share,
        verdict="" if share < _QUIET else ": it was not quiet, so rates are low and latencies are long",
        title=TITLE,
        quick=" `--quick`" if scale < 1 else "",
        rounds=rounds,
        window=_WINDOW,
    )
    return _report(head, describe_machine(_ROOT), cpu, latency)


if __name__ == "__main__":
    sys.exit(main())
