"""The admin endpoint: /metrics for Prometheus, /healthz and /readyz for whatever starts and balances gateways."""

import os
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from aiohttp import web

from gateway.errors import ConfigurationError
from gateway.server.settings import AdminSettings
from gateway.telemetry.aggregate import Snapshot, exposition

__all__ = ["Admin", "Readiness"]

_SHUTDOWN_S: Final = 1.0
"""How long a scrape under way may take when the gateway stops."""


class Readiness(Protocol):
    """What /readyz tells."""

    @property
    def problems(self) -> list[str]:
        """Why devices cannot connect; empty when they can."""

    @property
    def degradations(self) -> list[str]:
        """What is not well although devices can connect."""


class Admin:
    """The HTTP server. Serves from `open` to `close`."""

    def __init__(
        self, settings: AdminSettings, readiness: Readiness, collect: Callable[[], Awaitable[Snapshot]]
    ) -> None:
        self._settings = settings
        self._readiness = readiness
        self._collect = collect
        self._runner: web.AppRunner | None = None

    async def open(self) -> str:
        """Bind and serve; the address that was bound. Raises ConfigurationError when it is taken."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await self._runner.setup()
        bind = self._settings.bind
        try:
            await web.TCPSite(self._runner, bind.host, bind.port).start()
        except OSError as exc:
            await self._runner.cleanup()
            number = exc.errno or 0
            why = (
                os.strerror(number) if number > 0 else exc
            )  # its own text is asyncio's and has the address again
            raise ConfigurationError(
                f"admin.bind: cannot listen on {bind}: {why}: choose another address or stop what uses it"
            ) from exc
        host, port = self._runner.addresses[0][:2]
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stop serving."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        body, content_type = exposition(await self._collect(), request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _readyz(self, _: web.Request) -> web.Response:
        problems = self._readiness.problems
        if problems:
            return web.json_response({"status": "not ready", "reasons": problems}, status=503)
        degradations = self._readiness.degradations
        if degradations:
            return web.json_response({"status": "degraded", "reasons": degradations})
        return web.json_response({"status": "ready"})
