"""One run of one case, from its start to its result."""

import datetime as dt
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.machine import describe_machine, revision
from bench.result import Result
from bench.suite import Others, Suite, share_cores

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "bench" / "build"
RESULTS = ROOT / "bench" / "results"


def measured(
    case: str,
    work: Callable[[Suite], None],
    *,
    rounds: int,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Run it and give what it measured; what it needs on disk meanwhile stands below bench/build, on a real disk."""
    BUILD.mkdir(exist_ok=True)
    servers, load = share_cores()
    load_average, others = os.getloadavg()[0], Others(len(servers | load))
    date = dt.datetime.now(dt.UTC)
    with tempfile.TemporaryDirectory(prefix="run-", dir=BUILD) as scratch:
        suite = Suite(quick, rounds, ROOT, BUILD, Path(scratch), servers, load, say)
        work(suite)
    return Result(
        case=case,
        quick=quick,
        rounds=rounds,
        date=date.strftime("%Y-%m-%d %H:%M"),
        revision=revision(ROOT),
        machine={**describe_machine(), "Cores of the servers": _cores(servers, load)},
        versions=suite.record.versions,
        others_busy=round(others.share(), 4),
        load_average=round(load_average, 2),
        took_s=round(others.took_s(), 1),
        series=suite.record.series(),
    )


def _cores(servers: frozenset[int], load: frozenset[int]) -> str:
    if servers & load:
        return "one, shared with the load generator: all figures are too high"
    return f"{len(servers)}; the load generator has one of its own"
