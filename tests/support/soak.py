"""A long load with faults mixed in: what drives it, what is looked at meanwhile, and what a line through that says."""

import dataclasses
import json
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import psutil

from tests.support.gateway import Gateway

__all__ = ["SERIES", "Rounds", "Sample", "Sampler", "growth_per_hour", "plot"]

SERIES: Final = (
    "supervisor_rss_mb", "follower_rss_mb", "worker_rss_mb", "open_files", "tasks", "spool_files"
)  # fmt: skip
SLACK_S: Final = 1.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look at the gateway, `at` seconds after the beginning. RSS of a worker is of the one that no fault kills."""

    at: float
    supervisor_rss_mb: float
    follower_rss_mb: float
    worker_rss_mb: float
    open_files: int
    """of all processes"""
    tasks: int
    spool_files: int


class Rounds:
    """One of the C load generators, started again and again with the same arguments, until the block is left.

    A round in which a worker is killed has failures, and ends early: what it did until then is not counted.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.done = 0
        self.rounds = 0
        self.failed_rounds = 0
        self.complaints: list[str] = []
        self._command = command
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            done = subprocess.run(
                self._command, input="\n", capture_output=True, text=True, check=False, timeout=300
            )
            self.rounds += 1
            if done.returncode:
                self.failed_rounds += 1
                self.complaints.append(done.stderr[-300:])
            found = re.search(r'^\{"count".*$', done.stdout, re.MULTILINE)
            if found is not None:
                result = json.loads(found.group())
                self.done += result["count"] - result.get("failures", 0)


class Sampler:
    """Looks at the gateway every `every_s` seconds, on a thread, until the block is left."""

    def __init__(self, gateway: Gateway, steady_worker: int, every_s: float) -> None:
        self.samples: list[Sample] = []
        self.began = time.monotonic()
        self._gateway = gateway
        self._steady_worker = steady_worker
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.samples.append(self.look())
            except (psutil.NoSuchProcess, ValueError, OSError):
                continue  # a process is just being replaced

    def look(self) -> Sample:
        """How it is now."""
        supervisor, *children = (psutil.Process(pid) for pid in self._gateway.pids())
        follower = psutil.Process(self._gateway.follower_pid())
        return Sample(
            at=time.monotonic() - self.began,
            supervisor_rss_mb=_rss_mb(supervisor),
            follower_rss_mb=_rss_mb(follower),
            worker_rss_mb=_rss_mb(psutil.Process(self._steady_worker)),
            open_files=sum(process.num_fds() for process in (supervisor, *children)),
            tasks=int(self._gateway.metric("pskgw_tasks")),
            spool_files=sum(
                1 for path in (self._gateway.directory / "data" / "spool").rglob("*") if path.is_file()
            ),
        )


def _rss_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


def growth_per_hour(samples: Sequence[Sample], series: str) -> float:
    """The slope of the line of least squares through one series."""
    line = statistics.linear_regression(
        [sample.at / 3600 for sample in samples], [getattr(sample, series) for sample in samples]
    )
    return line.slope


def plot(samples: Sequence[Sample], faults: Sequence[tuple[float, str]], path: Path) -> None:
    """Draw all series over time, with a line at each fault."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(SERIES), 1, sharex=True, figsize=(9, 11))
    for axis, series in zip(axes, SERIES, strict=True):
        axis.plot([sample.at for sample in samples], [getattr(sample, series) for sample in samples], lw=1)
        axis.set_ylabel(series.replace("_", " "), fontsize=8)
        axis.set_ylim(bottom=0)
        for at, _ in faults:
            axis.axvline(at, color="tab:red", lw=0.3)
    axes[-1].set_xlabel("seconds; red: a fault")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
