"""How much memory a process holds while something happens."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

__all__ = ["MemoryWatch", "resident_bytes"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_EVERY_S = 0.005


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


class MemoryWatch:
    """Samples the resident memory of processes; `growth_bytes` is the most that one of them grew inside the block."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._start = {pid: resident_bytes(pid) for pid in pids}
        self._most = dict(self._start)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory")

    @property
    def growth_bytes(self) -> int:
        return max(self._most[pid] - start for pid, start in self._start.items())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_EVERY_S):
            self._look()

    def _look(self) -> None:
        for pid, most in self._most.items():
            self._most[pid] = max(most, resident_bytes(pid))
