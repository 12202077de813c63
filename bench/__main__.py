"""`python -m bench`: run gateway and peers side by side, and write bench/RESULTS.md and the charts.

    python -m bench                   every case, registry of 1,000,000: about 25 minutes, and two more the first time
    python -m bench --quick           every case in small, below two minutes
    python -m bench memory stream     these alone; the others keep what they measured last
    python -m bench --render          measure nothing, write the report anew

Each case keeps its figures in bench/results/CASE.json. Linux only. The peers' packages are installed when run as root on
Debian. What is kept for the next run (compiled load generators, registries) is under bench/build; `make clean` removes it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import report
from bench.cases import CASES
from bench.errors import BenchError
from bench.requirements import ensure_installed
from bench.result import Result, load, save
from bench.run import RESULTS, ROOT, measured
from bench.targets import TARGETS
from gateway.errors import GatewayError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    # A gateway that compiles its modules at each start is late, and has a heap left over in which sessions find room.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    console = Console(stderr=True, highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are stopped then, too
    try:
        if not options.render:
            ensure_installed(console.print)
            for name in options.cases or CASES:
                _run(name, options, console)
        page = report.write(options.output, load(options.results, report.ORDER))
    except (BenchError, GatewayError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, this case was not written", file=sys.stderr)
        return 1
    print(f"Written: {os.path.relpath(page)}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of the gateway beside its peers."
    )
    # choices= would refuse that none is named
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all, {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="the small size, below two minutes for all")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of each measurement; each case has its default"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, write the report anew")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "bench", metavar="DIR",
        help="where RESULTS.md and charts/ go, default: bench",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.render and options.cases:
        parser.error("--render measures nothing: name no case")
    return options


def _run(name: str, options: argparse.Namespace, console: Console) -> None:
    case = CASES[name]
    rounds = options.rounds or (case.quick_rounds if options.quick else case.rounds)
    with console.status(name, refresh_per_second=1) as status:  # drawing takes time from the cores measured
        result = measured(
            name,
            case.run,
            rounds=rounds,
            quick=options.quick,
            say=lambda what: status.update(f"{name}: {what}"),
        )
    save(options.results, result)
    _summarise(result, console)


def _summarise(result: Result, console: Console) -> None:
    console.print(
        f"{result.case}: {result.took_s or 0:.0f} s, other programs took {result.others_busy or 0:.0%} of the machine"
    )
    for target in TARGETS:
        if target.case == result.case and (verdict := target.verdict(result)) is not None:
            beside = f" beside {target.peer}" if target.peer else ""
            print(f"{target.what}{beside}: {verdict.measured}, target {target.bound()}: {verdict.word}")


if __name__ == "__main__":
    sys.exit(main())
