"""Large blocks between small ones that stay: in a process of its own, whose heap is new."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os
import sys
from gateway.server.processes.heap import LARGE_BYTES, give_back_large_blocks
from tests.support.memory import resident_bytes

if sys.argv[1] == "gives back":
    give_back_large_blocks()

first = bytearray(8 * LARGE_BYTES)
del first  # from here on the C library would take such sizes from the heap
before = resident_bytes(os.getpid())
large, small = [], []
for _ in range(50):
    large.append(bytearray(b"x" * (2 * LARGE_BYTES)))
    small.append(bytearray(b"x" * (LARGE_BYTES // 4)))
large.clear()
print(resident_bytes(os.getpid()) - before)
"""
LARGE_BYTES = 50 * 256 * 1024


def kept_bytes(how: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(ran.stdout)


def test_large_blocks_between_small_ones_go_back() -> None:
    assert kept_bytes("gives back") < LARGE_BYTES / 4


def test_without_it_the_heap_keeps_them() -> None:
    """Else the other test says nothing: on a C library that gives back by itself it can go."""
    assert kept_bytes("as it is") > LARGE_BYTES / 2
