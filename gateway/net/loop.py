"""The event loop: uvloop where it is installed, else asyncio's own; and the garbage collector, for who serves on it."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["freeze", "run"]

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
