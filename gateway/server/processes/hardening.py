"""What a process does about the keys in its memory: no core file of it, and no debugger of the same user."""

import ctypes
import resource
import sys
from typing import Final

__all__ = ["harden"]

_PR_SET_DUMPABLE: Final = 4


def harden() -> None:
    """Forbid core files and ptrace of this process; its environment and memory in /proc are root's from then on.

    A core pattern that is a pipe ignores the limit, so both are needed. Done by each process for itself: an exec undoes the
    second. Beside Linux there is the limit alone.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
