"""bench/RESULTS.md: the tables, with the target beside each figure that has one."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.measure import MemorySample, Results, Sample
from bench.plan import MEMORY_TARGET_BYTES, SUITES, Case, Plan, Suite, Work

GATEWAY = "Gateway"
MOSQUITTO = "Mosquitto"
_SATURATED = 0.9
_QUIET = 0.05
"""Share of the machine that other programs may take."""


def render(plan: Plan, results: Results, machine: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """The whole page."""
    parts = [
        _INTRODUCTION.format(rounds=plan.rounds, size=plan.name),
        "## Machine and versions\n\n" + _table(("what", "value"), (*machine.items(), *versions.items())),
        "## Connect + handshake + close\n\n" + _HANDSHAKE.format(plan=plan, seen=_seen(results)),
        *(_suite_section(suite, results) for suite in SUITES),
        _lines_section(results),
        _limit_section(results),
        _memory_section(plan, results),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def replace_part(path: Path, title: str, part: str) -> None:
    """Put a part of the page, from its first-level heading to the next one or the end, in the place of the one before."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, _, after = f"\n{text}".partition(f"\n{title}\n")
    _, found, rest = after.partition("\n# ")
    parts = [before.strip("\n"), part.strip("\n"), f"# {rest}".strip("\n") if found else ""]
    path.write_text("\n\n".join(each for each in parts if each) + "\n", encoding="utf-8")


def summary(results: Results) -> Iterator[str]:
    """The rows with a target, one line each, for the terminal."""
    for case in _cases(results.samples):
        if case.target is not None:
            pair = _Pair(case, results.samples)
            yield f"{case.suite.label}, {case.clients} clients: {pair.ratio()} of Mosquitto, target {pair.target()}"
    for sample in _memory_medians(results.memory, GATEWAY):
        yield f"Memory per idle session: {_kib(sample)} KiB, target <= {_kib(MEMORY_TARGET_BYTES)} KiB"


_INTRODUCTION = """\
# Results of the benchmarks

Written by `python -m bench` ({size} size); not edited. CPU is user and system time of the server's whole process tree, per
connection, as the kernel accounts it; the figure is the median of the rounds (here {rounds}), the range is in brackets. Servers take turns
within each round, on the same cores, and a ratio is the median of the rounds' ratios.
"""

_HANDSHAKE = """\
Gateway: as `gatewayctl init` configures it, one worker, metrics, limits, log and follower switched on, {plan.devices:,} devices in
SQLite, {seen}. Mosquitto: a psk_file of {plan.peer_devices:,} lines, errors logged only, no MQTT after the handshake.
Both send a PSK identity hint. Latency is from connect to the end of the handshake. The load generator waits awake on its own
core: asleep, it would be woken by nearly every write of a server slower than itself, some 10 us each, which a device
on another machine does not cost."""

_LIMIT = """\
## Was the load generator the limit?

A server is busy while it runs, or is ready to and its core is taken; with several processes that can exceed 100 %. The generator
is busy while it has something to do. A row whose server is {saturated:.0%} busy or more was limited by the server; with one
client at a time each side waits for the other by design. CPU per connection is no rate: a slow generator lengthens
the wall time, not this figure. {others}"""

_MEMORY = """\
## Memory of idle sessions

{plan.memory_sessions:,} sessions, TLS 1.2 PSK-AES128-GCM-SHA256, fresh servers, nothing sent. Per session, without file pages (libraries, the
replica: they are shared and do not grow with sessions); all resident pages in brackets. Median of {plan.memory_rounds}. Without sessions: all
processes, pages that several of them use counted once."""


def _seen(results: Results) -> str:
    times = results.connections_per_device[GATEWAY]
    return "each seen for the first time" if times <= 1 else f"each seen {times:.1f} times"


def _suite_section(suite: Suite, results: Results) -> str:
    cases = [case for case in _cases(results.samples) if case.work is Work.HANDSHAKE and case.suite is suite]
    rows = [_Pair(case, results.samples).row() for case in cases]
    head = ("clients", "gateway, us CPU", "Mosquitto, us CPU", "ratio", "target")
    return f"### {suite.label}\n\n" + _table(
        (*head, "gateway p50 / p99 / p99.9, us", "Mosquitto p50 / p99 / p99.9, us"), rows
    )


def _lines_section(results: Results) -> str:
    rows = []
    for case in _cases(results.samples):
        if case.work is Work.LINE:
            own = _of(results.samples, GATEWAY, case)
            rows.append((case.suite.label, str(case.clients), _spread(own, _cpu_us), "-", _latency(own)))
    if not rows:
        return ""
    head = ("suite", "clients", "gateway, us CPU", "target", "p50 / p99 / p99.9, us")
    return (
        f"## {Work.LINE.value[0].upper()}{Work.LINE.value[1:]}\n\nThe gateway alone, route to a file: the line is acknowledged "
        "when its batch is on the disk (fsync).\n\n" + _table(head, rows)
    )


def _limit_section(results: Results) -> str:
    rows = []
    for case in _cases(results.samples):
        for name in (GATEWAY, MOSQUITTO):
            own = _of(results.samples, name, case)
            if own:
                server = statistics.median(sample.server_busy for sample in own)
                generator = statistics.median(sample.generator_busy for sample in own)
                limit = _limit(case, server, generator)
                work = "with a line" if case.work is Work.LINE else ""
                label = f"{case.suite.label} {work}".strip()
                rows.append((label, str(case.clients), name, f"{server:.0%}", f"{generator:.0%}", limit))
    text = _LIMIT.format(saturated=_SATURATED, others=_others(results))
    return (
        text
        + "\n\n"
        + _table(("suite", "clients", "server", "server busy", "generator busy", "limited by"), rows)
    )


def _others(results: Results) -> str:
    share = f"Programs outside of the benchmark took {results.others_busy:.1%} of the machine meanwhile"
    if results.others_busy <= _QUIET:
        return f"{share}."
    return f"**{share}: it was not quiet, so latencies are long and ranges wide; run it again.**"


def _limit(case: Case, server: float, generator: float) -> str:
    if case.clients == 1:
        return "turn-taking"
    if server >= _SATURATED:
        return "server"
    return "generator" if generator >= _SATURATED else "neither alone"


def _memory_section(plan: Plan, results: Results) -> str:
    rows = []
    for name, target in ((GATEWAY, MEMORY_TARGET_BYTES), (MOSQUITTO, None)):
        own = [sample for sample in results.memory if sample.server == name]
        if own:
            anonymous = _kib(statistics.median(sample.anonymous_bytes for sample in own))
            resident = _kib(statistics.median(sample.resident_bytes for sample in own))
            empty = statistics.median(sample.empty_bytes for sample in own) / 2**20
            wanted = f"<= {_kib(target)} KiB" if target is not None else "-"
            rows.append((name, f"{anonymous} KiB ({resident} KiB)", wanted, f"{empty:.0f} MiB"))
    return (
        _MEMORY.format(plan=plan)
        + "\n\n"
        + _table(("server", "per session", "target", "without sessions"), rows)
    )


class _Pair:
    """A case as the gateway and as Mosquitto did it."""

    def __init__(self, case: Case, samples: Iterable[Sample]) -> None:
        samples = tuple(samples)
        self._case = case
        self._gateway = _of(samples, GATEWAY, case)
        self._peer = _of(samples, MOSQUITTO, case)

    def row(self) -> tuple[str, ...]:
        return (
            str(self._case.clients),
            _spread(self._gateway, _cpu_us),
            _spread(self._peer, _cpu_us),
            self.ratio(),
            self.target(),
            _latency(self._gateway),
            _latency(self._peer),
        )

    def ratio(self) -> str:
        ratios = self._ratios()
        return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"

    def target(self) -> str:
        if self._case.target is None:
            return "-"
        ratios = self._ratios()
        verdict = (
            "" if not ratios else ", met" if statistics.median(ratios) <= self._case.target else ", missed"
        )
        return f"<= {self._case.target:.1f}x{verdict}"

    def _ratios(self) -> list[float]:
        peer = {sample.round: sample.cpu_us for sample in self._peer}
        return [sample.cpu_us / peer[sample.round] for sample in self._gateway if sample.round in peer]


def _cases(samples: Iterable[Sample]) -> list[Case]:
    return list(dict.fromkeys(sample.case for sample in samples))


def _of(samples: Iterable[Sample], server: str, case: Case) -> list[Sample]:
    return [sample for sample in samples if sample.server == server and sample.case == case]


def _memory_medians(samples: Sequence[MemorySample], server: str) -> Iterator[float]:
    own = [sample.anonymous_bytes for sample in samples if sample.server == server]
    if own:
        yield statistics.median(own)


def _cpu_us(sample: Sample) -> float:
    return sample.cpu_us


def _spread(samples: Sequence[Sample], value: Callable[[Sample], float]) -> str:
    values = [value(sample) for sample in samples]
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})" if values else "-"


def _latency(samples: Sequence[Sample]) -> str:
    if not samples:
        return "-"
    quantiles = zip(*((s.load.p50_us, s.load.p99_us, s.load.p999_us) for s in samples), strict=True)
    return " / ".join(f"{statistics.median(values):.0f}" for values in quantiles)


def _kib(size: float) -> str:
    return f"{size / 1024:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
