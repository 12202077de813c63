"""`python -m bench`: run gateway and peers side by side and write bench/RESULTS.md.

    python -m bench            1,000,000 devices, about five minutes, a minute more the first time
    python -m bench --quick    10,000 devices, below two minutes

Linux only. The peer's packages are installed when run as root on Debian. What is kept for the next run (the compiled load
generator, the registry) is under bench/build; `make clean` removes it.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.errors import BenchError
from bench.generator import Generator
from bench.machine import describe_machine
from bench.measure import measure, steps
from bench.node import Gateway
from bench.peers import Mosquitto
from bench.plan import FULL, QUICK, Plan
from bench.registry import Node, prepare_node
from bench.report import render, replace_part, summary
from bench.requirements import ensure_installed
from gateway.errors import GatewayError

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_BUILD = _HERE / "build"


def main() -> int:
    plan, output = _parse_arguments()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are stopped then, too
    try:
        text, lines = _run(plan, console)
    except (BenchError, GatewayError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 1
    replace_part(output, "# Results of the benchmarks", text)
    for line in lines:
        print(line)
    print(f"Written: {os.path.relpath(output)}")
    return 0


def _parse_arguments() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of the gateway beside its peers."
    )
    parser.add_argument(
        "--quick", action="store_true", help="the small size: 10,000 devices, below two minutes"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each measurement")
    parser.add_argument(
        "--output", type=Path, default=_HERE / "RESULTS.md", metavar="FILE", help="default: bench/RESULTS.md"
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.rounds is not None:
        if options.rounds < 1:
            parser.error("--rounds: at least 1")
        plan = replace(plan, rounds=options.rounds)
    return plan, options.output


def _run(plan: Plan, console: Console) -> tuple[str, list[str]]:
    ensure_installed(console.print)
    _BUILD.mkdir(exist_ok=True)
    servers, load = _share_cores()
    generator = Generator.build(_HERE / "load.c", _BUILD, load, own_core=not servers & load)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, _progress(console) as progress:
        folder = Path(scratch)
        node = _prepare_node(plan, progress)
        gateway = Gateway(folder, node, servers, _ROOT)
        mosquitto = Mosquitto(folder, plan.peer_devices, servers)
        peers = (gateway, mosquitto)
        task = progress.add_task("measure", total=steps(plan, peers))

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        results = measure(plan, peers, generator, len(servers | load), step)
    versions = {
        **gateway.versions(),
        **mosquitto.versions(),
        "OpenSSL of Mosquitto and of the load generator": generator.openssl_version(),
    }
    machine = {**describe_machine(_ROOT), "Load generator": _describe_share(servers, load)}
    return render(plan, results, machine, versions), list(summary(results))


def _prepare_node(plan: Plan, progress: Progress) -> Node:
    task = progress.add_task(f"registry of {plan.devices:,} devices", total=plan.devices)
    node = prepare_node(_BUILD, plan.devices, lambda done: progress.update(task, completed=done))
    progress.remove_task(task)
    return node


def _share_cores() -> tuple[frozenset[int], frozenset[int]]:
    """Cores for servers, and the one for the load generator; the same one when there is no other."""
    cores = sorted(os.sched_getaffinity(0))
    return frozenset(cores[:-1] or cores), frozenset(cores[-1:])


def _describe_share(servers: frozenset[int], load: frozenset[int]) -> str:
    if servers & load:
        return "on the servers' only core, asleep while it waits: all figures are too high"
    return "one core; servers the others" if len(servers) > 1 else "one core; servers the other"


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawn rarely: it takes time from the cores that are measured.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        yield progress


if __name__ == "__main__":
    sys.exit(main())
