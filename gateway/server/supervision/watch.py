"""What the service manager hears while the gateway lives: when it is ready, how it is, and that it is not stuck."""

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.server.supervision.notify import ServiceManager

__all__ = ["keep_informed", "keep_watchdog"]

_EVERY_S: Final = 0.5
_PATIENCE_S: Final = 30.0
"""How much longer a start may take, said again and again while there is a reason to wait."""
_BEATS: Final = 3
"""How often within the time of the watchdog it hears that we are alive."""


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


async def keep_watchdog(manager: ServiceManager, is_alive: Callable[[], bool]) -> None:
    """Say `alive` as long as a worker is: when none is, the service manager ends us all. Until cancelled."""
    if manager.watchdog_s is None:
        return
    while True:
        if is_alive():
            manager.alive()
        await asyncio.sleep(manager.watchdog_s / _BEATS)
