"""Server processes: started on chosen cores, measured as a whole tree, ended by id.

CPU time of a tree is the process CPU clock of each living member (nanoseconds, every thread, ended ones included)
and what the members have reaped of their ended children (`cutime` and `cstime`, in ticks). Unlike a sum of `utime`
and `stime` it is not rounded to 10 ms per process, which would be 10 us per connection in a burst of a thousand.
"""

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of a process tree."""

    resident: int
    anonymous: int
    """Without file pages: what the processes allocated, not what they have mapped (libraries, the replica)."""
    proportional: int
    """A page that N processes use counts as 1/N for each."""


class Server:
    """A server program and its children."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_alive(self) -> None:
        """Raises BenchError with the end of the log when the program has ended."""
        status = self._process.poll()
        if status is not None:
            raise BenchError(f"{_shown(self._process)} ended with status {status}: {self.last_words()}")

    def last_words(self) -> str:
        """The end of the log, in one line."""
        return (
            " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-5:]) or "it said nothing"
        )

    def cpu_s(self) -> float:
        """User and system time of the whole tree since its start."""
        return sum(_own_cpu_s(pid) + _reaped_cpu_s(pid) for pid in _tree(self.pid))

    def starved_s(self) -> float:
        """How long its living threads were ready to run, but without a core; 0 where the kernel does not tell."""
        return sum(_starved_s(pid) for pid in _tree(self.pid))

    def memory(self) -> Memory:
        parts = [_memory(pid) for pid in _tree(self.pid)]
        return Memory(
            sum(part.resident for part in parts),
            sum(part.anonymous for part in parts),
            sum(part.proportional for part in parts),
        )

    def pin(self, cpus: frozenset[int]) -> None:
        """Keep every thread of the tree to these cores from now on, and what they start."""
        for pid in _tree(self.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), cpus)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for whatever of the tree is left after a while."""
        members = _tree(self.pid)
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid, started in members.items():
            fields = _stat(pid)
            if (
                fields is not None and _started(fields) == started
            ):  # never a stranger that got the number since
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def start_server(
    argv: Sequence[str], *, log: Path, cpus: frozenset[int], cwd: Path, env: Mapping[str, str] | None = None
) -> Server:
    """Start a program whose output goes to `log`, with `env` on top of our environment."""
    with pinned(cpus), log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
    return Server(process, log)


@contextmanager
def pinned(cpus: frozenset[int]) -> Iterator[None]:
    """Programs started inside inherit these cores, from their first instruction."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def machine_busy_s() -> float:
    """CPU seconds that all programs of the machine together, and the kernel, have used."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def _shown(process: "subprocess.Popen[bytes]") -> str:
    args = process.args
    return " ".join(map(str, args)) if isinstance(args, Sequence) and not isinstance(args, str) else str(args)


def _tree(root: int) -> dict[int, int]:
    """The processes with and below `root`, each with its start time."""
    stats: dict[int, list[str]] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            pid = int(folder.name)
            fields = _stat(pid)
            if fields is not None:
                stats[pid] = fields
                children[int(fields[1])].append(pid)
    members: dict[int, int] = {}
    pending = [root]
    while pending:
        pid = pending.pop()
        if pid in stats:
            members[pid] = _started(stats[pid])
            pending.extend(children[pid])
    return members


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on, or None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started(fields: Sequence[str]) -> int:
    return int(fields[19])


def _own_cpu_s(pid: int) -> float:
    clock = (~pid << 3) | 2  # what clock_getcpuclockid(3) gives for a process on Linux
    try:
        return time.clock_gettime(clock)
    except OSError:  # ended meanwhile; its parent has the time when it has reaped it
        return 0.0


def _reaped_cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[13]) + int(fields[14])) / _TICKS_PER_S if fields is not None else 0.0


def _starved_s(pid: int) -> float:
    total_ns = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread ended meanwhile
            total_ns += int(file.read_text().split()[1])
    return total_ns / 1e9


def _memory(pid: int) -> Memory:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return Memory(0, 0, 0)
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup.splitlines()[1:]}
    return Memory(values["Rss"], values["Anonymous"], values["Pss"])
