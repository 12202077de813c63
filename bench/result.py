"""What a case measured, as a file: bench/results/CASE.json, one per case, committed.

Each run of a case replaces its file and no other, so that one case can be measured again alone. bench/RESULTS.md and the
charts are made from the files.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.errors import BenchError

__all__ = ["Result", "Series", "load", "save"]


class Series(msgspec.Struct, frozen=True):
    """The figures of one server under one load, round by round."""

    row: str
    """The kind of work, or the cipher suite"""
    at: int
    """How many clients, sessions, devices or workers"""
    server: str
    figures: dict[str, list[float]]
    """By name (bench/figures.py), one value per round"""

    def median(self, figure: str) -> float | None:
        values = self.figures.get(figure)
        return statistics.median(values) if values else None


class Result(msgspec.Struct, frozen=True):
    """One run of one case."""

    case: str
    quick: bool
    rounds: int
    date: str
    """UTC"""
    revision: str
    machine: dict[str, str]
    versions: dict[str, str]
    others_busy: float | None
    """Share of the machine that programs outside of the benchmark took meanwhile; None: nobody looked"""
    load_average: float | None
    """Of the minute before it began"""
    took_s: float | None
    series: list[Series]
    note: str = ""
    """What somebody wants said beside the figures"""

    def of(self, row: str, at: int, server: str) -> Series | None:
        return next((s for s in self.series if (s.row, s.at, s.server) == (row, at, server)), None)

    def servers(self) -> list[str]:
        return list(dict.fromkeys(series.server for series in self.series))

    def rows(self) -> list[str]:
        return list(dict.fromkeys(series.row for series in self.series))


def ratios(own: Series, peer: Series, figure: str) -> list[float]:
    """Round by round: what else the machine did then met both alike."""
    return [
        a / b for a, b in zip(own.figures.get(figure, ()), peer.figures.get(figure, ()), strict=False) if b
    ]


def save(folder: Path, result: Result) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.case}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return path


def load(folder: Path, cases: Iterable[str]) -> Sequence[Result]:
    """Those that there are, in the order of `cases`; raises BenchError when a file is none of ours."""
    paths = (folder / f"{case}.json" for case in cases)
    return [_read(path) for path in paths if path.exists()]


def _read(path: Path) -> Result:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except msgspec.MsgspecError as exc:
        raise BenchError(f"{path} is not a result of this bench suite, delete it: {exc}") from exc
