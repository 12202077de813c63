"""The load generator: load.c, compiled when needed, run as a program of its own on a core of its own."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.plan import CipherSuite, Work
from bench.processes import pinned

_HOLD_S = 600
_RUN_S_MAX = 300


@dataclass(frozen=True, slots=True)
class Load:
    """What load.c is asked for."""

    address: str
    suite: CipherSuite
    clients: int
    connections: int
    first: int
    devices: int
    work: Work = Work.HANDSHAKE
    stride: int = 1
    """From one device to the next"""

    def arguments(self) -> list[str]:
        arguments = ["--connect", self.address, "--suite", self.suite.name]
        arguments += ["--clients", str(self.clients), "--count", str(self.connections)]
        arguments += ["--first", str(self.first), "--devices", str(self.devices)]
        arguments += ["--stride", str(self.stride)]
        if self.work.value is not None:
            arguments += ["--round-trip", self.work.value]
        return arguments


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What load.c measured; latencies from connect to the end of the handshake, or to the answer."""

    count: int
    failures: int
    orderly: int
    """Connections whose peer ended with close_notify."""
    wall_s: float
    cpu_s: float
    """Of the load generator, without what it takes to wait awake."""
    idle_s: float
    """Wall time in which the load generator had nothing to do but to wait for the server."""
    p50_us: int
    p99_us: int
    p999_us: int
    max_us: int


class Generator:
    """The compiled load.c.

    On a core of its own it waits awake, see load.c: servers then do not pay for waking it, as they would not pay for a
    device on another machine.
    """

    def __init__(self, program: Path, cpus: frozenset[int], *, own_core: bool) -> None:
        self._program = program
        self._cpus = cpus
        self._options = ("--spin",) if own_core else ()

    @classmethod
    def build(cls, source: Path, folder: Path, cpus: frozenset[int], *, own_core: bool) -> "Generator":
        """Compile `source` into `folder` unless the program there is newer."""
        program = compiled(source, folder, "-lssl", "-lcrypto")
        return cls(program, cpus, own_core=own_core)

    def openssl_version(self) -> str:
        done = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True)
        return re.sub(r"^(OpenSSL \S+).*", r"\1", done.stdout.strip())

    def run(self, load: Load) -> LoadResult:
        """Run the load to its end; raises BenchError when a connection failed."""
        with self._started(load.arguments()) as process:
            output, complaints = process.communicate(timeout=_RUN_S_MAX)
        return _parse(process.returncode, output, complaints)

    @contextmanager
    def held(self, load: Load) -> Iterator[int]:
        """All connections of the load open at once while the block runs; gives their number."""
        with self._started([*load.arguments(), "--hold", str(_HOLD_S)]) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            if first.startswith('{"held"'):
                yield int(json.loads(first)["held"])
                process.send_signal(signal.SIGTERM)
                first = ""
            output, complaints = process.communicate(timeout=_RUN_S_MAX)
        _parse(process.returncode, first + output, complaints)

    def until_closed(self, load: Load, act: Callable[[], object]) -> float:
        """Hold one session, do something that makes the server close it, and give the seconds from then to the close."""
        with self._started([*load.arguments(), "--hold", str(_HOLD_S)]) as process:
            assert process.stdout is not None
            if not process.stdout.readline().startswith('{"held"'):
                raise BenchError("the session could not be opened")
            act()
            began = time.monotonic()
            process.wait(_RUN_S_MAX)  # it ends with its only session
            return time.monotonic() - began

    @contextmanager
    def _started(self, arguments: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
        with pinned(self._cpus):
            process = subprocess.Popen(
                [self._program, *arguments, *self._options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def compiled(source: Path, folder: Path, *options: str) -> Path:
    """Compile a C file into `folder` unless what is there is newer; `options` come last."""
    folder.mkdir(exist_ok=True)
    program = folder / source.stem
    newest = max(each.stat().st_mtime for each in (source, source.with_name("client.h")))
    if not program.exists() or program.stat().st_mtime < newest:
        argv = ["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-o", str(program), str(source), *options]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{source.name} does not compile: {done.stderr.strip().splitlines()[-1:]}")
    return program


def _parse(status: int, output: str, complaints: str) -> LoadResult:
    if status != 0:
        reasons = " | ".join(complaints.strip().splitlines()[:3])
        raise BenchError(f"connections failed under load: {reasons or f'load ended with status {status}'}")
    return LoadResult(**json.loads(output))
