"""What a large fleet costs: `python -m bench.imports`.

Registries of several sizes are made by `gatewayctl import-devices` from a psk_file, each in a process of its own, whose
time and memory are measured. Then a gateway on each of them takes the same handshakes, in turns and in changing order: the
cost of a handshake must not depend on the size of the registry.

    --sizes N ...        default: 1000 100000 1000000
    --registry URL       measure only the import of the largest size into this empty database, with a gateway that follows
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bench import fleet
from bench.errors import BenchError
from bench.generator import Generator, Load
from bench.machine import describe_machine
from bench.node import Gateway
from bench.peers import Running, running
from bench.plan import PSK_GCM
from bench.registry import HINT, REALM, Node
from gateway.registry import feed
from gateway.registry.database import make_engine, read
from gateway.registry.founding import initialise
from gateway.registry.ledger import Author
from gateway.registry.migrate import migrate
from gateway.registry.sealing import MasterKey
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry

_ROOT = Path(__file__).parents[1]
_BUILD = Path(__file__).parent / "build"
_AUTHOR = Author("bench", "bench")
_CLIENTS = 64
_CONNECTIONS = 5_000
_ROUNDS = 5
_FOLLOWED_S = 600


@dataclass(frozen=True, slots=True)
class Import:
    """What one import took."""

    devices: int
    wall_s: float
    cpu_s: float
    resident_bytes: int
    """At its highest."""

    def row(self, database: str) -> str:
        return (
            f"| {self.devices:,} | {database} | {self.wall_s:.1f} | {self.cpu_s:.1f} | "
            f"{self.resident_bytes / 2**20:.0f} |"
        )


@dataclass(frozen=True, slots=True)
class RemoteNode(Node):
    """A node whose registry is a database elsewhere."""

    url: str

    @property
    def registry_url(self) -> str:
        return self.url


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.imports", description="What a large fleet costs.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], metavar="N")
    parser.add_argument("--registry", metavar="URL")
    options = parser.parse_args()
    for name, value in describe_machine(_ROOT).items():
        print(f"{name}: {value}")
    packages = ("SQLAlchemy", "cryptography", "lmdb", "psycopg")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"Python {sys.version.split()[0]}, {versions}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if options.registry:
            lines = _followed(Path(folder), max(options.sizes), options.registry)
        else:
            lines = _sizes(Path(folder), options.sizes)
        for line in lines:
            print(line, flush=True)


def _sizes(folder: Path, sizes: Sequence[int]) -> Iterator[str]:
    yield "| devices | registry | import, s | CPU, s | resident at most, MiB |\n|---|---|---|---|---|"
    nodes = []
    for devices in sizes:
        home = folder / str(devices)
        home.mkdir()
        node = Node(home, devices)
        _found(node)
        yield _import(node).row("SQLite")
        nodes.append(node)
    yield from _handshakes(folder, nodes)


def _followed(folder: Path, devices: int, url: str) -> Iterator[str]:
    node = RemoteNode(folder, devices, url)
    _found(node)
    cores = frozenset(os.sched_getaffinity(0))
    with running(Gateway(folder, node, cores, _ROOT)) as gateway:
        before_s = gateway.server.cpu_s()
        took = _import(node)
        lag_s = _wait_until_followed(gateway, node)
        cpu_s = gateway.server.cpu_s() - before_s
    yield "| devices | registry | import, s | CPU, s | resident at most, MiB |\n|---|---|---|---|---|"
    yield took.row(url.partition(":")[0])
    yield f"\nA gateway followed: it knew the last device {lag_s:.1f} s after the import had ended, for {cpu_s:.1f} s of CPU."


def _found(node: Node) -> None:
    settings = RegistrySettings(url=node.registry_url, master_key_file=node.master_key_file)
    MasterKey.generate().write(node.master_key_file)
    migrate(settings.url)
    initialise(settings, _AUTHOR)
    with Registry(settings, _AUTHOR) as registry:
        registry.add_realm(REALM, hint=HINT)


def _import(node: Node) -> Import:
    psk_file = node.folder / "fleet.psk"
    fleet.write_psk_file(psk_file, node.devices)
    command = [sys.executable, "-m", "gateway", "init", str(node.folder / "configured")]
    subprocess.run(command, check=True, capture_output=True, cwd=_ROOT)
    environment = os.environ | {
        "PSKGW_CONFIG": str(node.folder / "configured" / "gateway.toml"),
        "PSKGW_REGISTRY__URL": node.registry_url,
        "PSKGW_REGISTRY__MASTER_KEY_FILE": str(node.master_key_file),
    }
    command = [sys.executable, "-m", "gateway", "import-devices", str(psk_file), "--format", "mosquitto"]
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--realm", REALM], env=environment, cwd=_ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"the import failed with status {process.returncode}")
    return Import(node.devices, wall_s, _cpu_s(usage), usage.ru_maxrss * 1024)


def _cpu_s(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _wait_until_followed(gateway: Running, node: Node) -> float:
    """How long it took from now on. A device of the last chunk that gets in is known by the follower and the worker."""
    generator = _generator()
    engine = make_engine(node.registry_url)
    with read(engine) as connection:
        assert feed.credential_count(connection) == node.devices
    engine.dispose()
    began = time.monotonic()
    while time.monotonic() - began < _FOLLOWED_S:
        try:
            generator.run(Load(gateway.address, PSK_GCM, 1, 1, node.devices - 1, node.devices))
        except BenchError:  # refused: not known yet
            time.sleep(0.2)
        else:
            return time.monotonic() - began
    raise BenchError(f"the gateway does not know the last device after {_FOLLOWED_S} s")


def _generator() -> Generator:
    _BUILD.mkdir(exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    own_core = len(cores) > 1
    return Generator.build(Path(__file__).parent / "load.c", _BUILD, frozenset(cores[-1:]), own_core=own_core)


def _handshakes(folder: Path, nodes: Sequence[Node]) -> Iterator[str]:
    generator = _generator()
    cores = sorted(os.sched_getaffinity(0))
    figures: dict[int, list[float]] = {node.devices: [] for node in nodes}
    with ExitStack() as stack:
        gateways = []
        for node in nodes:
            home = folder / f"gateway-{node.devices}"
            home.mkdir()
            began = time.monotonic()
            peer = Gateway(home, node, frozenset(cores[:-1] or cores), _ROOT)
            gateways.append((node.devices, stack.enter_context(running(peer))))
            yield f"\nA gateway with {node.devices:,} devices was ready {time.monotonic() - began:.1f} s after its start, first copy included."
        for number in range(_ROUNDS + 1):  # the first one warms up
            for devices, gateway in gateways if number % 2 else gateways[::-1]:
                figures[devices].append(_cpu_us(generator, gateway, number))
    yield "\n| devices | us CPU per connect + handshake + close |\n|---|---|"
    for devices, (_, *values) in figures.items():
        yield f"| {devices:,} | {statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f}) |"


def _cpu_us(generator: Generator, gateway: Running, number: int) -> float:
    """Devices far apart from each other and seen for the first time, where there are enough of them."""
    first = number * _CONNECTIONS % gateway.devices
    before = gateway.server.cpu_s()
    generator.run(Load(gateway.address, PSK_GCM, _CLIENTS, _CONNECTIONS, first, gateway.devices))
    time.sleep(0.05)
    return (gateway.server.cpu_s() - before) / _CONNECTIONS * 1e6


if __name__ == "__main__":
    main()
