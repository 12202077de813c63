"""What a large fleet costs to import, by `gatewayctl import-devices` from a psk_file, in a process of its own.

The case `import` of the suite takes SQLite registries of several sizes. `python -m bench.imports --registry URL` takes an
empty database elsewhere, with a gateway that follows, and keeps what it measured as the case `import-followed`.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bench import fleet
from bench.errors import BenchError
from bench.generator import Load
from bench.node import GATEWAY, Gateway
from bench.peers import Running, running
from bench.plan import PSK_GCM
from bench.processes import pinned
from bench.registry import HINT, REALM, Node
from bench.result import save
from bench.run import RESULTS, measured
from bench.suite import Suite
from gateway.registry import feed
from gateway.registry.database import make_engine, read
from gateway.registry.founding import initialise
from gateway.registry.ledger import Author
from gateway.registry.migrate import migrate
from gateway.registry.sealing import MasterKey
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry

_ROOT = Path(__file__).parents[1]
SQLITE = "SQLite"
_AUTHOR = Author("bench", "bench")
_FOLLOWED_S = 600


@dataclass(frozen=True, slots=True)
class Import:
    """What one import took."""

    devices: int
    wall_s: float
    cpu_s: float
    resident_bytes: int
    """At its highest."""

    def figures(self) -> dict[str, float]:
        return {
            "import_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "resident_mib": self.resident_bytes / 2**20,
        }


@dataclass(frozen=True, slots=True)
class RemoteNode(Node):
    """A node whose registry is a database elsewhere."""

    url: str

    @property
    def registry_url(self) -> str:
        return self.url


def run(suite: Suite) -> None:
    """The case `import`."""
    for name in ("SQLAlchemy", "cryptography"):
        suite.record.versions[name] = metadata.version(name)
    for devices in suite.pick((1_000, 100_000, 1_000_000), (1_000, 10_000)):
        for number in range(suite.rounds):
            suite.say(f"import of {devices:,} devices, round {number + 1}")
            home = suite.scratch / f"{devices}-{number}"
            home.mkdir()
            node = Node(home, devices)
            _found(node)
            suite.record.add(SQLITE, devices, GATEWAY, _import(node, suite.servers).figures())


def followed(suite: Suite, devices: int, url: str) -> None:
    """The case `import-followed`."""
    for name in ("SQLAlchemy", "cryptography", "lmdb", "psycopg"):
        suite.record.versions[name] = metadata.version(name)
    node = RemoteNode(suite.scratch, devices, url)
    _found(node)
    cores = suite.servers | suite.load
    with running(Gateway(suite.scratch / "gateway", node, cores, suite.root)) as gateway:
        before_s = gateway.server.cpu_s()
        figures = _import(node, cores).figures()
        lag_s = _wait_until_followed(suite, gateway, node)
        following_s = gateway.server.cpu_s() - before_s
    more = {"lag_s": lag_s, "following_s": following_s}
    suite.record.add(url.partition(":")[0], devices, GATEWAY, figures | more)


def _found(node: Node) -> None:
    settings = RegistrySettings(url=node.registry_url, master_key_file=node.master_key_file)
    MasterKey.generate().write(node.master_key_file)
    migrate(settings.url)
    initialise(settings, _AUTHOR)
    with Registry(settings, _AUTHOR) as registry:
        registry.add_realm(REALM, hint=HINT)


def _import(node: Node, cpus: frozenset[int]) -> Import:
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
    with pinned(cpus):
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


def _wait_until_followed(suite: Suite, gateway: Running, node: Node) -> float:
    """How long it took from now on. A device of the last chunk that gets in is known by the follower and the worker."""
    generator = suite.generator()
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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.imports", description="An import that a gateway follows."
    )
    parser.add_argument(
        "--registry", required=True, metavar="URL", help="an empty database, as in registry.url"
    )
    parser.add_argument("--devices", type=int, default=1_000_000, metavar="N", help="default: 1,000,000")
    options = parser.parse_args()
    result = measured(
        "import-followed", lambda suite: followed(suite, options.devices, options.registry), rounds=1
    )
    print(f"Written: {save(RESULTS, result)}; `python -m bench --render` shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
