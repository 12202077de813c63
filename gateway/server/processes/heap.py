"""What a process does about the memory that it does not need any more."""

import contextlib
import ctypes
from typing import Final

__all__ = ["LARGE_BYTES", "give_back_large_blocks"]

_M_MMAP_THRESHOLD: Final = -3
LARGE_BYTES: Final = 128 * 1024


def give_back_large_blocks() -> None:
    """Let the kernel have blocks of LARGE_BYTES or more as soon as they are free.

    So the GNU C library begins; but with the first of them that is freed it raises the bound to its size (mallopt(3)),
    and what is freed from then on stays in holes of the heap. For a process that needs much once in a while; where the
    same size is needed all the time, the heap is faster. Other C libraries have no such setting.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
