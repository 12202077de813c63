"""The event loop: uvloop where it is installed, else asyncio's own; and the garbage collector, for who serves on it."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

__all__ = ["freeze", "run"]

_GC_THRESHOLDS: Final = (20_000, 50, 50)
"""Connections leave no cycles behind, so looking for some at every 700 objects, as is Python's default, finds nothing."""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a new event loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def freeze() -> None:
    """Everything that is loaded stays: the collector need not look at it again for all that comes and goes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
