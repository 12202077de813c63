"""What the service manager hears while the gateway lives: when it is ready, how it is, and that it is not stuck."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from gateway.server.children import Child
from gateway.server.notify import ServiceManager

__all__ = ["keep_informed", "keep_watchdog"]

log = structlog.get_logger()

_EVERY_S: Final = 0.5
_PATIENCE_S: Final = 30.0
"""How much longer a start may take, said again and again while there is a reason to wait."""
_BEATS: Final = 3
"""How often within the time of the watchdog workers are asked."""


async def keep_informed(
    manager: ServiceManager, is_ready: Callable[[], bool], status: Callable[[], str]
) -> None:
    """Say `ready` once devices can connect, and the status whenever it is another. Until cancelled."""
    while not is_ready():
        manager.starting(status(), _PATIENCE_S)
        await asyncio.sleep(_EVERY_S)
    manager.ready(status())
    while True:
        manager.status(status())
        await asyncio.sleep(_EVERY_S)


async def keep_watchdog(
    manager: ServiceManager,
    workers: Callable[[], Sequence[Child]],
    silent: Callable[[float], Awaitable[list[Child]]],
) -> None:
    """Say `alive` as long as a worker answers. One that does not while others do is killed, and so replaced, after the
    time of the watchdog; when none answers the service manager ends us all. Until cancelled.
    """
    if manager.watchdog_s is None:
        return
    beat_s = manager.watchdog_s / _BEATS
    missed: dict[int, int] = {}
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        mute = await silent(beat_s)
        if len(mute) < len(workers()) or not workers():
            manager.alive()
            missed = {pid: missed.get(pid, 0) + 1 for each in mute if (pid := each.pid) is not None}
            for worker in mute:
                if worker.pid is not None and missed[worker.pid] >= _BEATS:
                    log.error(
                        "child_killed", child=worker.name, reason=f"silent for {manager.watchdog_s:g} s"
                    )
                    worker.kill()
        await asyncio.sleep(max(0.0, began + beat_s - loop.time()))
