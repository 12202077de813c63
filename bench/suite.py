"""What every case is given: cores, folders, generators, the size of the run; and how it keeps what it measures.

In each round every server is given the same load, one directly after the other and in changing order, so that whatever else
the machine does meets all alike; ratios are taken within a round.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.generator import Generator, Load, LoadResult
from bench.peers import Running
from bench.processes import Server, machine_busy_s
from bench.registry import Node, prepare_node
from bench.result import Series

SETTLE_S: float = 0.02
"""Each connection was waited for to its end; this lets the server go back to its event loop."""

_T = TypeVar("_T")


@dataclass
class Record:
    """The figures of a run while it goes on."""

    _figures: dict[tuple[str, int, str], dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, at: int, server: str, figures: Mapping[str, float]) -> None:
        """One round's."""
        own = self._figures.setdefault((row, at, server), {})
        for name, value in figures.items():
            own.setdefault(name, []).append(round(value, 4))

    def series(self) -> list[Series]:
        return [Series(*key, figures) for key, figures in self._figures.items()]


@dataclass(frozen=True)
class Suite:
    """One run."""

    quick: bool
    rounds: int
    root: Path
    build: Path
    """What is kept for the next run: compiled generators, registries"""
    scratch: Path
    """Of this case"""
    servers: frozenset[int]
    load: frozenset[int]
    """Cores"""
    say: Callable[[str], None]
    """What is being done now"""
    record: Record = field(default_factory=Record)

    def pick(self, full: _T, quick: _T) -> _T:
        return quick if self.quick else full

    def node(self, devices: int) -> Node:
        self.say(f"registry of {devices:,} devices")
        return prepare_node(self.build, devices, lambda done: self.say(f"registry: {done:,} devices written"))

    def generator(self, *, awake: bool = True) -> Generator:
        """load.c; `awake`: it never sleeps, unless it has no core of its own."""
        source = self.root / "bench" / "load.c"
        return Generator.build(source, self.build, self.load, own_core=awake and not self.servers & self.load)

    def handshakes(self, generator: Generator, row: str, running: Running, load: Load) -> None:
        """One burst of connections against one server, kept under its clients."""
        self.say(f"{running.name}: {row}, {load.clients} clients")
        self.record.add(row, load.clients, running.name, burst(generator, running.server, load))


def burst(generator: Generator, server: Server, load: Load) -> dict[str, float]:
    """The figures of one burst."""
    cpu_s, starved_s = server.cpu_s(), server.starved_s()
    result = generator.run(load)
    time.sleep(SETTLE_S)
    server.check_alive()
    return load_figures(result, server.cpu_s() - cpu_s, server.starved_s() - starved_s)


def load_figures(result: LoadResult, cpu_s: float, starved_s: float) -> dict[str, float]:
    """`starved_s`: how long the server's threads were ready to run, but without a core."""
    return {
        "cpu_us": cpu_s / result.count * 1e6,
        "p50_us": result.p50_us,
        "p99_us": result.p99_us,
        "p999_us": result.p999_us,
        "server_busy": (cpu_s + starved_s) / result.wall_s,
        "generator_busy": 1 - result.idle_s / result.wall_s,
    }


def in_turns(number: int, servers: Sequence[_T]) -> Sequence[_T]:
    return servers if number % 2 == 0 else servers[::-1]


class Others:
    """What programs outside of the benchmark take of the machine, from now on."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._began_s, self._busy_s = time.monotonic(), self._now_s()

    def share(self) -> float:
        """To be asked when every server of ours has ended: living children are not in our account."""
        wall_s = time.monotonic() - self._began_s
        return max(0.0, (self._now_s() - self._busy_s) / (wall_s * self._cores))

    def took_s(self) -> float:
        return time.monotonic() - self._began_s

    @staticmethod
    def _now_s() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return machine_busy_s() - sum(usage.ru_utime + usage.ru_stime for usage in usages)


def share_cores() -> tuple[frozenset[int], frozenset[int]]:
    """Cores for servers, and the one for the load generator; the same one when there is no other."""
    cores = sorted(os.sched_getaffinity(0))
    return frozenset(cores[:-1] or cores), frozenset(cores[-1:])


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began
