"""The measurements: servers alternately, in the same run, round after round.

In each round every case is given to every server that can do it, one directly after the other and in changing
order, so that whatever else the machine does meets both alike; ratios are taken within a round.
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bench.generator import Generator, Load, LoadResult
from bench.peers import Peer, Running, running
from bench.plan import PSK_GCM, SUITES, Case, Plan, Work
from bench.processes import machine_busy_s

_SETTLE_S = 0.02  # each connection was waited for to its end; this lets the server go back to its event loop
_MEMORY_SETTLE_S = 1.0
_MEMORY_WARM_UP = 16

Progress = Callable[[str], None]
"""Told what comes next; called once per step of the plan."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One burst of connections against one server."""

    server: str
    case: Case
    round: int
    cpu_s: float
    """Of the server's whole process tree."""
    starved_s: float
    """How long its threads were ready to run, but without a core."""
    load: LoadResult

    @property
    def cpu_us(self) -> float:
        """Of the server, per connection."""
        return self.cpu_s / self.load.count * 1e6

    @property
    def server_busy(self) -> float:
        """Share of the wall time in which the server ran or would have run; above 1 with several processes."""
        return (self.cpu_s + self.starved_s) / self.load.wall_s

    @property
    def generator_busy(self) -> float:
        """Share of the wall time in which the load generator had something to do."""
        return 1 - self.load.idle_s / self.load.wall_s


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What idle sessions cost one fresh server."""

    server: str
    sessions: int
    empty_bytes: int
    """Resident without sessions, shared pages counted once."""
    resident_bytes: int
    """More with them, per session."""
    anonymous_bytes: int
    """The same without file pages, which several sessions and processes share."""


@dataclass(frozen=True, slots=True)
class Results:
    samples: tuple[Sample, ...]
    memory: tuple[MemorySample, ...]
    others_busy: float
    """Share of the machine that programs outside of the benchmark took while connections were measured."""
    connections_per_device: Mapping[str, float]
    """By server: how often a device that it knows came; each for the first time when it is at most 1."""


def steps(plan: Plan, peers: Sequence[Peer]) -> int:
    """How many steps `measure` reports to its progress."""
    bursts = sum(case.work in peer.works for peer in peers for case in plan.cases())
    return len(peers) * (1 + len(SUITES) + plan.memory_rounds) + plan.rounds * bursts


def measure(
    plan: Plan, peers: Sequence[Peer], generator: Generator, cores: int, progress: Progress
) -> Results:
    """Run the whole plan."""
    with ExitStack() as stack:
        servers = []
        for peer in peers:
            progress(f"start {peer.name}")
            servers.append(stack.enter_context(running(peer)))
        bench = _Bench(generator)
        bench.warm_up(plan, servers, progress)
        others = _OtherPrograms(servers, cores)
        samples = tuple(bench.rounds(plan, servers, progress))
        others_busy = others.share()
    memory = tuple(_memory_rounds(plan, peers, generator, progress))
    return Results(
        samples,
        memory,
        others_busy,
        connections_per_device={
            server.name: bench.opened[server.name] / server.devices for server in servers
        },
    )


class _OtherPrograms:
    """What the rest of the machine does from now on."""

    def __init__(self, servers: Sequence[Running], cores: int) -> None:
        self._servers = servers
        self._cores = cores
        self._began_s, self._busy_s = time.monotonic(), self._now_s()

    def share(self) -> float:
        """CPU time of others by that of the machine."""
        wall_s = time.monotonic() - self._began_s
        return max(0.0, (self._now_s() - self._busy_s) / (wall_s * self._cores))

    def _now_s(self) -> float:
        ours_s = sum(server.server.cpu_s() for server in self._servers)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):  # the latter: load generators that ended
            usage = resource.getrusage(who)
            ours_s += usage.ru_utime + usage.ru_stime
        return machine_busy_s() - ours_s


class _Bench:
    """Gives each burst the devices that have not come yet."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.opened: dict[str, int] = {}

    def warm_up(self, plan: Plan, servers: Sequence[Running], progress: Progress) -> None:
        for suite in SUITES:
            for server in servers:
                progress(f"warm up {server.name}")
                self._burst(server, Case(Work.HANDSHAKE, suite, 64, plan.warm_up))

    def rounds(self, plan: Plan, servers: Sequence[Running], progress: Progress) -> Iterator[Sample]:
        for number in range(plan.rounds):
            for position, case in enumerate(plan.cases()):
                turn = servers if (number + position) % 2 == 0 else servers[::-1]
                for server in turn:
                    if case.work in server.works:
                        progress(
                            f"round {number + 1}: {server.name}, {case.suite.label}, {case.clients} clients"
                        )
                        yield self._sample(server, case, number)

    def _sample(self, running: Running, case: Case, number: int) -> Sample:
        server = running.server
        cpu_s, starved_s = server.cpu_s(), server.starved_s()
        load = self._burst(running, case)
        time.sleep(_SETTLE_S)
        server.check_alive()
        return Sample(
            running.name, case, number, server.cpu_s() - cpu_s, server.starved_s() - starved_s, load
        )

    def _burst(self, server: Running, case: Case) -> LoadResult:
        opened = self.opened.get(server.name, 0)
        self.opened[server.name] = opened + case.connections
        first = opened % server.devices
        return self._generator.run(
            Load(server.address, case.suite, case.clients, case.connections, first, server.devices, case.work)
        )


def _memory_rounds(
    plan: Plan, peers: Sequence[Peer], generator: Generator, progress: Progress
) -> Iterator[MemorySample]:
    for number in range(plan.memory_rounds):
        for peer in peers:
            progress(f"memory of {plan.memory_sessions} idle sessions, round {number + 1}: {peer.name}")
            with running(peer) as server:
                yield _memory_sample(server, plan.memory_sessions, generator)


def _memory_sample(server: Running, sessions: int, generator: Generator) -> MemorySample:
    generator.run(Load(server.address, PSK_GCM, 1, _MEMORY_WARM_UP, 0, server.devices))
    time.sleep(_MEMORY_SETTLE_S)
    empty = server.server.memory()
    load = Load(server.address, PSK_GCM, 16, sessions, 0, server.devices)
    with generator.held(load) as held:
        time.sleep(_MEMORY_SETTLE_S)
        full = server.server.memory()
    return MemorySample(
        server.name,
        held,
        empty.proportional,
        (full.resident - empty.resident) // held,
        (full.anonymous - empty.anonymous) // held,
    )
