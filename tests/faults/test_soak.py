"""A soak: connections and messages for a long time, with one fault after the other mixed in; nothing grows, nothing is lost."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bench
from bench.fleet import write_psk_file
from bench.generator import compiled
from gateway.registry.store import NewDevice
from tests.support.capabilities import missing
from tests.support.fleet import Fleet, judge
from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.servers import free_port
from tests.support.soak import SERIES, Rounds, Sample, Sampler, growth_per_hour, plot

DEVICES = 1000
FOLLOWER_MB = 40
"""A process of the gateway is larger than that once it has begun."""
REST_S = 30
"""Idle connections to backends are closed by then."""
REST_TASKS, REST_FILES = 4, 12
"""By how many there may be more at rest: workers that were replaced opened things in another order."""
SENDERS = 20
SQLITE_FILES = ("registry.db", "registry.db-wal", "registry.db-shm")
BENCH = Path(bench.__file__).parent
ROUTES = """
[[routes]]
name = "exact"
match = { identity = "d?" }
framing = "lines"
delivery = "spooled"
content_type = "text/plain"
backend = "events"
[[routes]]
name = "volume"
framing = "lines"
delivery = "spooled"
content_type = "text/plain"
backend = "sink"
"""
GROWTH_MAX = {
    "supervisor_rss_mb": 4,
    "follower_rss_mb": 4,
    "worker_rss_mb": 12,
    "open_files": 40,
    "tasks": 40,
    "spool_files": 20,
}
"""From the second fifth of the run to its last, whatever its length."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of it: it ends when all numbers are reached, or the time is over."""

    connections: int
    messages: int
    faults: int
    within_s: float
    fault_every_s: float
    sample_every_s: float
    round_connections: int
    round_messages: int


SHORT = Size(2_000, 20_000, 4, 25, 3, 0.25, 500, 5_000)
FULL = Size(1_000_000, 10_000_000, 20, 7200, 15, 1, 5_000, 100_000)


class Faults:
    """One fault after the other, each made good again before the next."""

    def __init__(self, gateway: Gateway, sink: "subprocess.Popen[bytes]", steady_worker: int) -> None:
        self.done: collections.Counter[str] = collections.Counter()
        self.at: list[tuple[float, str]] = []
        self._gateway = gateway
        self._sink = sink
        self._steady_worker = steady_worker
        self._kinds = itertools.cycle(
            (self.worker_killed, self.registry_away, self.file_away, self.sink_hangs, self.reload)
        )

    def next(self, began: float, lasting_s: float) -> None:
        """The next one."""
        kind = next(self._kinds)
        self.at.append((time.monotonic() - began, kind.__name__))
        kind(lasting_s)
        self.done[kind.__name__] += 1

    def worker_killed(self, _: float) -> None:
        (victim,) = set(self._gateway.worker_pids()) - {self._steady_worker}
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in self._gateway.worker_pids(), what="it is gone")
        wait_for(lambda: len(self._gateway.worker_pids()) == 2, 30, "a successor")

    def registry_away(self, lasting_s: float) -> None:
        aside = self._gateway.directory / "aside"
        aside.mkdir(exist_ok=True)
        move(self._gateway.directory, aside)
        time.sleep(lasting_s)
        move(aside, self._gateway.directory)

    def file_away(self, lasting_s: float) -> None:
        path = self._gateway.directory / "events.jsonl"
        aside = path.with_suffix(".aside")
        path.rename(aside)
        path.mkdir()
        time.sleep(lasting_s)
        path.rmdir()
        aside.rename(path)

    def sink_hangs(self, lasting_s: float) -> None:
        self._sink.send_signal(signal.SIGSTOP)
        time.sleep(lasting_s)
        self._sink.send_signal(signal.SIGCONT)

    def reload(self, _: float) -> None:
        assert self._gateway.process is not None
        self._gateway.process.send_signal(signal.SIGHUP)


def be_quiet(gateway: Gateway) -> None:
    """Log no connections from now on: there will be many."""
    assert gateway.process is not None
    gateway.config.write_text(gateway.config.read_text().replace('level = "debug"', 'level = "warning"'))
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: gateway.metric("pskgw_config_reloads_total", outcome="applied") == 1, what="the reload")


def move(source: Path, target: Path) -> None:
    for name in SQLITE_FILES:
        with contextlib.suppress(FileNotFoundError):
            (source / name).rename(target / name)


def at_rest(sampler: Sampler, before: Sample) -> Sample:
    """What is left when the load has ended, once it is no more than before; or after some time, whatever it is."""
    deadline = time.monotonic() + REST_S
    while True:
        now = sampler.look()
        is_as_before = now.tasks <= before.tasks and now.open_files <= before.open_files
        if is_as_before or time.monotonic() > deadline:
            return now
        time.sleep(0.5)


@contextlib.contextmanager
def sink_on(port: int) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-m", "bench.sink", str(port)], cwd=BENCH.parent)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def load_program(name: str) -> str:
    build = BENCH / "build"
    build.mkdir(exist_ok=True)
    try:
        return str(compiled(BENCH / f"{name}.c", build, "-lssl", "-lcrypto"))
    except FileNotFoundError:
        missing("no C compiler for the load generators")


def soak_gateway(directory: Path, sink_port: int) -> Gateway:
    gateway = new_gateway(
        directory,
        node="workers = 2",
        routes=ROUTES,
        backends=f'[backends.sink]\nkind = "http"\nurl = "http://127.0.0.1:{sink_port}/"\n',
    )
    write_psk_file(directory / "fleet.psk", DEVICES)
    gateway.ctl("import-devices", directory / "fleet.psk", "--format", "mosquitto")
    return gateway


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(FULL, id="full", marks=[pytest.mark.prove, pytest.mark.timeout(8000)]),
    ],
)
def test_nothing_grows_and_nothing_is_lost(
    tmp_path: Path, size: Size, measured: Callable[[str], None]
) -> None:
    load, messages = load_program("load"), load_program("messages")
    port = free_port()
    gateway = soak_gateway(tmp_path / "gateway", port)
    exact = gateway.add_devices(*(NewDevice(identity=f"d{number}") for number in range(4)))
    with sink_on(port) as sink, running(gateway):
        address = f"127.0.0.1:{gateway.port()}"
        churn = [load, "--connect", address, "--clients", "64", "--count", str(size.round_connections)]
        churn += ["--first", str(SENDERS), "--devices", str(DEVICES), "--round-trip", "line"]
        pour = [
            messages,
            "--connect",
            address,
            "--clients",
            str(SENDERS),
            "--count",
            str(size.round_messages),
        ]
        steady_worker = gateway.wait_for_event("child_started", child="worker-1")["pid"]
        be_quiet(gateway)
        sampler = Sampler(gateway, steady_worker, size.sample_every_s)
        wait_for(
            lambda: sampler.look().follower_rss_mb > FOLLOWER_MB, what="the follower of after the reload"
        )
        before = sampler.look()
        faults = Faults(gateway, sink, steady_worker)
        with (
            sampler,
            Rounds(churn) as connections,
            Rounds(pour) as poured,
            Fleet(gateway.port, exact, rate=20) as fleet,
        ):
            began = time.monotonic()
            while time.monotonic() < began + size.within_s and (
                connections.done < size.connections
                or poured.done < size.messages
                or faults.done.total() < size.faults
            ):
                time.sleep(size.fault_every_s)
                faults.next(sampler.began, size.fault_every_s / 3)
            took_s = time.monotonic() - began
        wait_for(lambda: gateway.metric("pskgw_outbox_messages") == 0, 60, "the spools are empty")
        found = judge(fleet.acknowledged, gateway.output_events()).check()
        after = at_rest(sampler, before)
        restarts = gateway.metric("pskgw_process_restarts_total")
    assert connections.done, connections.complaints
    assert poured.done, poured.complaints
    assert size is SHORT or took_s < size.within_s, "not all of its numbers were reached in time"
    assert after.tasks <= before.tasks + REST_TASKS, (before, after)
    assert after.open_files <= before.open_files + REST_FILES, (before, after)
    assert restarts == faults.done["worker_killed"], "no process ended but those that were killed"
    fifth = len(sampler.samples) // 5
    steady, last = sampler.samples[fifth : 2 * fifth], sampler.samples[-fifth:]
    growth = {
        series: statistics.median(getattr(each, series) for each in last)
        - statistics.median(getattr(each, series) for each in steady)
        for series in SERIES
    }
    slopes = {series: round(growth_per_hour(sampler.samples[fifth:], series), 2) for series in SERIES}
    measured(
        f"{took_s:.0f} s, {connections.done:,} connections ({connections.failed_rounds} of {connections.rounds} rounds "
        f"cut short by a kill), {poured.done:,} messages ({poured.failed_rounds} of {poured.rounds} rounds), "
        f"{found.acknowledged:,} compared one by one: {len(found.missing)} lost, {found.duplicates} twice; "
        f"faults {dict(faults.done)}; slopes per hour {slopes}; growth {growth}"
    )
    results = os.environ.get("SOAK_RESULTS")
    if results:
        plot(sampler.samples, faults.at, Path(results) / "soak.png")
        rows = [dataclasses.asdict(sample) for sample in sampler.samples]
        (Path(results) / "soak.json").write_text(json.dumps(rows))
    assert all(growth[series] <= GROWTH_MAX[series] for series in SERIES), growth
