"""A PNG chart per case: bars where servers stand beside each other, lines where something grows."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import FIGURES
from bench.result import Result, Series
from bench.sections import SERVER_COLOURS, Section
from bench.targets import TARGETS, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_OTHER_COLOURS = ("#1f5fa8", "#6aa0d8", "#7a4fa3", "#b08fd0", "#d98c1f", "#a8541f")
_TARGET_COLOUR = "#c01f2f"


def draw(result: Result, section: Section, path: Path) -> None:
    """Draw the figures of `section.charted`, one panel each."""
    from matplotlib.figure import Figure as Canvas  # the drawing library is of use here alone

    charted = {
        name: [series for series in result.series if name in series.figures] for name in section.charted
    }
    panels = {name: own for name, own in charted.items() if own}
    bars = section.chart == "bars"
    heights = [1.5 + 0.24 * len(own) if bars else 4.0 for own in panels.values()] or [1.5]
    canvas = Canvas(figsize=(9.0, sum(heights) + 0.6), dpi=110, layout="constrained")
    grid = canvas.add_gridspec(len(heights), 1, height_ratios=heights)
    for number, (name, own) in enumerate(panels.items()):
        axes = canvas.add_subplot(grid[number])
        (_bars if bars else _growth)(axes, own, name, section, result)
        axes.legend(fontsize=8)
    quick = ", quick size" if result.quick else ""
    canvas.suptitle(f"{section.title}\n{result.date} UTC, {result.revision}{quick}", fontsize=10)
    canvas.savefig(path, metadata={"Software": None})


def _bars(axes: "Axes", own: Sequence[Series], name: str, section: Section, result: Result) -> None:
    """A group per row and load, a bar per server, a whisker from the least round to the most."""
    groups = list(dict.fromkeys((series.row, series.at) for series in own))
    servers = list(dict.fromkeys(series.server for series in own))
    width = 0.8 / len(servers)
    for number, server in enumerate(servers):
        bars = [series for series in own if series.server == server]
        places = [
            groups.index((series.row, series.at)) + (number - (len(servers) - 1) / 2) * width
            for series in bars
        ]
        middles, spread = _middles(bars, name)
        colour = _colour(server, number)
        axes.barh(places, middles, width, xerr=spread, capsize=2, label=server, color=colour)
    for number, (place, most) in enumerate(_bounds(groups, name, result)):
        label = "target" if number == 0 else ""
        axes.vlines(most, place - 0.45, place + 0.45, colors=_TARGET_COLOUR, linestyles="--", label=label)
    axes.set_yticks(range(len(groups)), [f"{row}\n{at:,} {section.at}" for row, at in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(FIGURES[name].head())
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _middles(series: Sequence[Series], name: str) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the least and the most round are from them."""
    rounds = [each.figures[name] for each in series]
    middles = [statistics.median(values) for values in rounds]
    below = [middle - min(values) for middle, values in zip(middles, rounds, strict=True)]
    above = [max(values) - middle for middle, values in zip(middles, rounds, strict=True)]
    return middles, [below, above]


def _growth(axes: "Axes", own: Sequence[Series], name: str, section: Section, result: Result) -> None:
    rows = list(dict.fromkeys((series.row, series.server) for series in own))
    for number, (row, server) in enumerate(rows):
        points = sorted((s for s in own if (s.row, s.server) == (row, server)), key=lambda s: s.at)
        middles, spread = _middles(points, name)
        colour = _colour(server, number)
        at = [series.at for series in points]
        axes.errorbar(at, middles, yerr=spread, marker="o", capsize=3, label=f"{server}: {row}", color=colour)
    for target in _targets(name, result):
        axes.axhline(target.most, color=_TARGET_COLOUR, linestyle="--", label=f"target for {target.at:,}")
    if section.log:
        axes.set_xscale("log")
    elif len({series.at for series in own}) <= 3:
        axes.set_xticks(sorted({series.at for series in own}))
    axes.set_xlabel(section.at)
    axes.set_ylabel(FIGURES[name].head())
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _targets(name: str, result: Result) -> list[Target]:
    return [
        t
        for t in TARGETS
        if t.case == result.case and t.figure == name and t.peer is None and t.at is not None
    ]


def _bounds(groups: Sequence[tuple[str, int]], name: str, result: Result) -> list[tuple[int, float]]:
    """Where each target stands: on which group, at which height. A share of a peer is one of the peer's bar."""
    found = []
    for target in (t for t in TARGETS if t.case == result.case and t.figure == name):
        for place, (row, at) in enumerate(groups):
            if row == target.row and target.at in {None, at}:
                peer = result.of(row, at, target.peer) if target.peer is not None else None
                share = peer.median(name) if peer is not None else None
                if share is not None:
                    found.append((place, target.most * share))
                elif target.peer is None:
                    found.append((place, target.most))
    return found


def _colour(server: str, number: int) -> str:
    return SERVER_COLOURS.get(server, _OTHER_COLOURS[number % len(_OTHER_COLOURS)])
