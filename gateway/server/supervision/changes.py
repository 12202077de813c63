"""Reloads and upgrades of a running gateway: told by signals, done one after the other, refused without a trace.

Whatever is wrong with a new configuration or a new program, the running one goes on: the reason stands in the log, in
the status for the service manager, and a metric says that the last attempt failed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

import structlog

from gateway.errors import ConfigurationError, GatewayError
from gateway.server.supervision.node import SupervisorSettings
from gateway.server.supervision.notify import ServiceManager
from gateway.server.supervision.upgrade import Program, preflight
from gateway.telemetry.metrics import SupervisorMetrics

__all__ = ["Changes"]

log = structlog.get_logger()

Order = Literal["reload", "upgrade"]


class Changes:
    """Does what signals ask for.

    Args:
        program: this program, and how its successor on the disk is checked.
        load: reads the configuration as `run` does; blocks.
        settings: what is in force.
        apply: puts other settings in force, or raises GatewayError with nothing changed.
        replace: lets the program on the disk go on in this process. Returns only with why that cannot be done.
        status: one line about the gateway, for the service manager.

    """

    def __init__(
        self,
        program: Program,
        *,
        load: Callable[[], SupervisorSettings],
        settings: Callable[[], SupervisorSettings],
        apply: Callable[[SupervisorSettings], Awaitable[None]],
        replace: Callable[[], Awaitable[OSError]],
        status: Callable[[], str],
        manager: ServiceManager,
        metrics: SupervisorMetrics,
    ) -> None:
        self._program = program
        self._load = load
        self._settings = settings
        self._apply = apply
        self._replace = replace
        self._status = status
        self._manager = manager
        self._metrics = metrics
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._waiting: set[Order] = set()
        self.trouble = ""
        """why the last change was refused, for the status; empty when it was not"""

    def ask(self, order: Order) -> None:
        """A signal has come. A second order of a kind that waits already would find nothing to do."""
        if order not in self._waiting:
            self._waiting.add(order)
            self._orders.put_nowait(order)

    async def run(self) -> None:
        """Do what is asked, until cancelled."""
        self._applied()
        while True:
            order = await self._orders.get()
            self._waiting.remove(order)
            self._manager.reloading()
            if order == "upgrade" or self._program.has_changed:
                await self._upgrade()
            else:
                await self._reload()
            self._manager.ready(self._status())

    def _applied(self) -> None:
        self.trouble = ""
        self._metrics.reload_successful.set(1)
        self._metrics.reload_success_time.set(time.time())

    async def _reload(self) -> None:
        log.info("reloading")
        began = time.monotonic()
        try:
            await self._apply(await asyncio.to_thread(self._load))
        except GatewayError as exc:
            self._metrics.reload_successful.set(0)
            self._metrics.reloads.labels("refused").inc()
            self.trouble = f"reload refused, the configuration before stays in force: {exc}"
            log.error("reload_refused", reason=str(exc), note="the configuration before stays in force")
            return
        self._applied()
        self._metrics.reloads.labels("applied").inc()
        log.info("reloaded", duration_s=round(time.monotonic() - began, 3))

    async def _upgrade(self) -> None:
        log.info("upgrading", program=list(self._program.run))
        try:
            await preflight(self._program, self._settings().data_dir)
            failure = await self._replace()
            raise ConfigurationError(f"{self._program.run[0]} cannot be executed: {failure.strerror}")
        except GatewayError as exc:
            self._metrics.upgrades.labels("refused").inc()
            self.trouble = f"upgrade refused, the program before goes on: {exc}"
            log.error("upgrade_refused", reason=str(exc), note="the program before goes on")
