"""bench/RESULTS.md: the table of targets, then a section per case, from the result files alone."""

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.charts import draw
from bench.figures import FIGURES
from bench.peers import MOSQUITTO, STUNNEL
from bench.result import Result, Series, ratios
from bench.sections import SECTIONS, Section
from bench.targets import TARGETS, spread_of_ratios

__all__ = ["ORDER", "render", "write"]

ORDER = tuple(SECTIONS)
_SATURATED = 0.9
_QUIET = 0.05
"""Share of the machine that other programs may take."""
_LATENCIES = ("p50_us", "p99_us", "p999_us")
_BUSY = ("server_busy", "generator_busy")


def write(folder: Path, results: Sequence[Result]) -> Path:
    """Write RESULTS.md and charts/CASE.png into `folder`; gives the page."""
    charts = folder / "charts"
    charts.mkdir(parents=True, exist_ok=True)
    for result in results:
        draw(result, SECTIONS[result.case], charts / f"{result.case}.png")
    page = folder / "RESULTS.md"
    page.write_text(render(results), encoding="utf-8")
    return page


def render(results: Sequence[Result]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION, "## Targets\n\n" + _targets(results), _LIMITED]
    parts += [_section(result, SECTIONS[result.case]) for result in results]
    return "\n\n".join(part.strip() for part in parts) + "\n"


_INTRODUCTION = """\
# Results of the benchmarks

Written by `python -m bench` from bench/results, one file per case; not edited. CPU is user and system time of the server's whole
process tree, as the kernel accounts it; a figure is the median of the rounds, the range is in brackets. Servers take turns within
each round, on the same cores, and a ratio is the median of the rounds' ratios. Each section says when, on what and beside what
else it was measured; where other programs were busy, latencies are long, ranges wide and CPU figures too high, most
of all where the caches are shared. Where the microseconds go: [docs/performance.md](../docs/performance.md)."""

_LIMITED = """\
## Was the load generator the limit?

A server is busy while it runs, or while one of its threads that still live is ready to and its core is taken. The generator is
busy while it has something to do. A row whose server is 90% busy or more was limited by the server; with one
client at a time each side waits for the other by design; the last column of each table says which. CPU per connection is no
rate: a slow generator lengthens the wall time, and takes from the server what it saves by serving many at once, but its own time is not in the figure."""


def _targets(results: Sequence[Result]) -> str:
    by_case = {result.case: result for result in results}
    rows = []
    for target in TARGETS:
        result = by_case.get(target.case)
        verdict = target.verdict(result) if result is not None else None
        figure = FIGURES[target.figure]
        against = target.peer or "-"
        if result is None or verdict is None:
            rows.append((target.what, against, target.bound(), "-", "-", "-", "not measured"))
            continue
        ratio = verdict.measured if target.peer is not None else "-"
        word = verdict.word if verdict.word == "met" else f"**{verdict.word}**"
        notes = [
            note for note, is_so in (("quick", result.quick), ("not quiet", not _was_quiet(result))) if is_so
        ]
        word += f" ({', '.join(notes)})" if notes else ""
        gateway, peer = (
            f"{text} {figure.unit}" if text != "-" else text for text in (verdict.gateway, verdict.peer)
        )
        rows.append((target.what, against, target.bound(), gateway, peer, ratio, word))
    return _table(("work", "against", "target", "gateway", "peer", "ratio", "verdict"), rows)


def _section(result: Result, section: Section) -> str:
    chart = f"![{section.title}](charts/{result.case}.png)"
    return "\n\n".join(
        [
            f"## {section.title}",
            textwrap.fill(section.text, 128),
            _conditions(result),
            _figures(result, section),
            chart,
        ]
    )


def _conditions(result: Result) -> str:
    machine = ", ".join(f"{name}: {value}" for name, value in result.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
    size = "quick size, " if result.quick else ""
    seen = []
    if result.others_busy is not None:
        seen.append(f"other programs took {result.others_busy:.0%} of the machine")
    if result.load_average is not None:
        seen.append(f"load average before {result.load_average:.1f}")
    quiet = ", ".join(seen) or "nobody looked at the load"
    if not _was_quiet(result):
        quiet = f"**{quiet}: not quiet, run it again**"
    took = f", {result.took_s:.0f} s" if result.took_s is not None else ""
    rounds = f"{result.rounds} round{'s' if result.rounds > 1 else ''}"
    return (
        f"Measured {result.date} UTC, {size}{rounds}{took}; revision {result.revision}; {quiet}.\n"
        f"{machine}. {versions}. {result.note}".rstrip()
    )


def _was_quiet(result: Result) -> bool:
    return result.others_busy is not None and result.others_busy <= _QUIET


def _figures(result: Result, section: Section) -> str:
    """One line per series; only columns that some series fills."""
    present = {name for series in result.series for name in series.figures}
    plain = [name for name in FIGURES if name in present and name not in {*_LATENCIES, *_BUSY}]
    has_work = len(result.rows()) > 1
    heads = [*(["work"] if has_work else []), section.at, "server", *(FIGURES[name].head() for name in plain)]
    heads += [f"of {peer}" for peer in section.peers if peer in result.servers()]
    if "p50_us" in present:
        heads.append("p50 / p99 / p99.9, us" if "p999_us" in present else "p50 / p99, us")
    if "generator_busy" in present:
        heads += ["server busy", "generator busy", "limited by"]
    return _table(heads, (_line(series, result, section, plain, present) for series in _sorted(result)))


def _sorted(result: Result) -> list[Series]:
    rows, servers = result.rows(), result.servers()
    return sorted(result.series, key=lambda s: (rows.index(s.row), s.at, servers.index(s.server)))


def _line(
    series: Series, result: Result, section: Section, plain: Sequence[str], present: set[str]
) -> list[str]:
    cells = [series.row] if len(result.rows()) > 1 else []
    cells += [f"{series.at:,}", series.server]
    cells += [FIGURES[name].spread(series.figures[name]) if name in series.figures else "-" for name in plain]
    cells += [_ratio(series, result, section, peer) for peer in section.peers if peer in result.servers()]
    if "p50_us" in present:
        cells.append(_latency(series, [name for name in _LATENCIES if name in present]))
    if "generator_busy" in present:
        cells += _limit(series)
    return cells


def _ratio(series: Series, result: Result, section: Section, peer: str) -> str:
    other = result.of(series.row, series.at, peer)
    if other is None or _is_peer(series.server):
        return "-"
    charted = itertools.chain.from_iterable(ratios(series, other, name) for name in section.charted)
    quotients = list(charted)
    return spread_of_ratios(quotients) if quotients else "-"


def _is_peer(server: str) -> bool:
    return server.startswith((MOSQUITTO, STUNNEL))


def _latency(series: Series, names: Iterable[str]) -> str:
    values = [series.median(name) for name in names]
    return " / ".join(f"{value:,.0f}" if value is not None else "-" for value in values)


def _limit(series: Series) -> Iterator[str]:
    server, generator = (_share(series.figures.get(name)) for name in _BUSY)
    yield from (f"{share:.0%}" for share in (server, generator))
    if server >= _SATURATED:
        yield "server"
    elif generator >= _SATURATED:
        yield "generator"
    else:
        yield "turn-taking" if series.at == 1 else "neither alone"


def _share(values: Sequence[float] | None) -> float:
    """Threads that wait for the same core count each, so that there can be more than all of it."""
    return min(1.0, statistics.median(values)) if values else 0.0


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
