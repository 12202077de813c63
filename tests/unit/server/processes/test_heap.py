"""Large blocks between small ones that stay: in a process of its own, whose heap is new."""

import subprocess
import sys

PROGRAM = """
import sys
from gateway.server.processes.heap import LARGE_BYTES, give_back_large_blocks

if sys.argv[1] == "gives back":
    give_back_large_blocks()

def resident_kib():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4

first = bytearray(8 * LARGE_BYTES)
del first  # from here on the C library would take such sizes from the heap
before = resident_kib()
large, small = [], []
for _ in range(50):
    large.append(bytearray(b"x" * (2 * LARGE_BYTES)))
    small.append(bytearray(b"x" * (LARGE_BYTES // 4)))
large.clear()
print(resident_kib() - before)
"""
LARGE_KIB = 50 * 256


def kept_kib(how: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=60
    )
    return int(ran.stdout)


def test_large_blocks_between_small_ones_go_back() -> None:
    assert kept_kib("gives back") < LARGE_KIB / 4


def test_without_it_the_heap_keeps_them() -> None:
    """Else the other test says nothing: on a C library that gives back by itself it can go."""
    assert kept_kib("as it is") > LARGE_KIB / 2
