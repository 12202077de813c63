"""The admin endpoint: /metrics for Prometheus, /healthz and /readyz for whatever starts and balances gateways.

With `admin.token` only /metrics asks for it: the probes of systemd, Kubernetes and balancers have no place for a secret, and
what they are told is what a connection to the listener would tell them too. A client certificate, where
`admin.tls.client_ca_file` asks for one, is needed for all of them.
"""

import hmac
import ipaddress
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog
from aiohttp import web

from gateway.errors import ConfigurationError
from gateway.server.settings import Address
from gateway.server.supervision.admin_settings import AdminSettings, AdminTls
from gateway.telemetry.aggregate import Snapshot, exposition

__all__ = ["Admin", "Readiness"]

log = structlog.get_logger()

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
        self._token = None if settings.token is None else settings.token.get_secret_value().encode()
        self._certificate: _Certificate | None = None
        self._runner: web.AppRunner | None = None

    async def open(self, sock: socket.socket) -> str:
        """Serve on a listening socket, which stays the caller's; its address. Raises ConfigurationError: no certificate."""
        if self._settings.tls is not None:
            self._certificate = _Certificate(self._settings.tls)
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
        context = None if self._certificate is None else self._certificate.context
        await web.SockSite(self._runner, sock.dup(), ssl_context=context).start()
        host, port = sock.getsockname()[:2]
        self._warn_if_open(host)
        return str(Address(host, port))

    async def close(self) -> None:
        """Stop serving."""
        if self._runner is not None:
            await self._runner.cleanup()

    def _warn_if_open(self, host: str) -> None:
        """Metrics tell how large a fleet is and when it is in trouble: say so where strangers may read them."""
        tls = self._settings.tls
        knows_clients = self._token is not None or (tls is not None and tls.client_ca_file is not None)
        if ipaddress.ip_address(host).is_loopback or (tls is not None and knows_clients):
            return
        lacks = [name for name, given in (("admin.tls", tls), ("admin.token", knows_clients)) if not given]
        log.warning(
            "admin_is_open",
            address=host,
            note=f"anybody who reaches it reads the metrics: set {' and '.join(lacks)}, or bind it to 127.0.0.1",
        )

    def _is_allowed(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        is_same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
        return is_same and scheme.lower() == "bearer"

    async def _metrics(self, request: web.Request) -> web.Response:
        if not self._is_allowed(request):
            return web.Response(
                status=401,
                text="the token of admin.token is missing or another: send Authorization: Bearer TOKEN\n",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._certificate is not None:
            self._certificate.follow()
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


class _Certificate:
    """The endpoint's TLS. A certificate that was renewed in its file is taken at the next scrape, for later connections."""

    def __init__(self, settings: AdminTls) -> None:
        self._settings = settings
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            self._load()
            if settings.client_ca_file is not None:
                self.context.load_verify_locations(settings.client_ca_file)
                self.context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
            raise ConfigurationError(
                f"admin.tls: {_why(settings, exc)}: check certificate_file, key_file and client_ca_file"
            ) from exc

    def follow(self) -> None:
        """Read the files again when they are others than those that were read."""
        try:
            if self._stamps() != self._loaded:
                self._load()
        except (OSError, ValueError) as exc:  # half renewed: the old one goes on, the next scrape looks again
            log.warning("admin_certificate_unusable", reason=_why(self._settings, exc))

    def _load(self) -> None:
        self._loaded = self._stamps()
        self.context.load_cert_chain(
            self._settings.certificate_file,
            self._settings.key_file,
            password="",  # an encrypted key is refused, not asked for on a terminal
        )

    def _stamps(self) -> list[tuple[int, int]]:
        files = (self._settings.certificate_file, self._settings.key_file)
        return [(state.st_mtime_ns, state.st_ino) for state in map(os.stat, files)]


def _why(settings: AdminTls, exc: OSError | ValueError) -> str:
    """What is wrong with the files, without what stands in them."""
    if isinstance(exc, ssl.SSLError) or not isinstance(exc, OSError):
        return f"{settings.certificate_file} and {settings.key_file} are no certificate with its key in PEM"
    files = (settings.certificate_file, settings.key_file, settings.client_ca_file)
    unreadable = next(
        (file for file in files if file is not None and not os.access(file, os.R_OK)), exc.filename
    )
    return f"{unreadable} cannot be read: {exc.strerror}"
