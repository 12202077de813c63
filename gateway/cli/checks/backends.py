"""Does every backend answer?"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gateway.cli.checks.finding import Finding
from gateway.errors import BackendError

if TYPE_CHECKING:
    from gateway.config import GatewaySettings

__all__ = ["check_backends"]

BACKEND_S: Final = 10.0
"""How long a backend may take to answer; a service that needs longer serves no device."""


def check_backends(settings: "GatewaySettings") -> Iterator[Finding]:
    routes = {route.backend: route for route in reversed(settings.routes)}
    for name, backend in settings.backends.items():
        check = f"backend {name}"
        if name not in routes:
            yield Finding(
                check, "warning", "no route uses it", f"remove [backends.{name}], or name it in a route"
            )
        try:
            said = asyncio.run(_try_backend(name, backend, settings.node.data_dir))
        except BackendError as exc:
            yield Finding(check, "error", str(exc), _backend_fix(backend.kind, str(exc)))
        else:
            yield Finding(check, "ok", said)


async def _try_backend(name: str, backend: Any, data_dir: Path) -> str:
    """What can be said of a backend that is well. Raises BackendError."""
    from gateway.errors import BackendUnavailable
    from gateway.forward.backends import SINKS
    from gateway.forward.backends.tcp import TcpBackend, TcpSettings
    from gateway.net.poller import Poller

    if backend.kind == "file":
        return _try_file(name, backend.path)
    try:
        async with asyncio.timeout(BACKEND_S):
            if isinstance(backend, TcpSettings):
                quick = backend.model_copy(update={"connect_timeout_s": min(backend.connect_timeout_s, 3.0)})
                poller = Poller(asyncio.get_running_loop())
                await TcpBackend(name, quick).connect(poller, _Closing())
                await asyncio.sleep(0)  # the connection's end
                poller.close()
                return "the service takes connections"
            sink = SINKS[backend.kind](name, backend, "application/octet-stream", data_dir / "stdout.lock")
            try:
                await sink.open()
            finally:
                await sink.close()
    except TimeoutError:
        raise BackendUnavailable(f"backend {name}: no answer within {BACKEND_S:g} s") from None
    return "the service answers" if backend.kind == "http" else "the service answers and accepts the login"


class _Closing(asyncio.Protocol):
    """Ends the connection that it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _try_file(name: str, path: str) -> str:
    from gateway.errors import BackendUnavailable

    if path == "-":
        return "it writes to stdout"
    file = Path(path)
    place = file if file.exists() else file.parent
    if not place.exists():
        raise BackendUnavailable(f"backend {name}: the folder {place} does not exist")
    if not os.access(place, os.W_OK):
        raise BackendUnavailable(f"backend {name}: {place} cannot be written by this user")
    with contextlib.suppress(OSError):
        state = os.statvfs(place)
        free = state.f_bavail * state.f_frsize
        return f"{file} can be written, {free >> 20} MiB are free"
    return f"{file} can be written"


def _backend_fix(kind: str, said: str) -> str:
    if "check " in said or "create " in said or "bind one" in said:
        return said.rpartition(": ")[2]
    if kind == "file":
        return "make the folder, or make it writable for this user"
    if "certificate" in said or "TLS" in said or "_file" in said:
        return "check ca_file, cert_file, key_file and the host name in the URL"
    return "start the service, and check host and port in the configuration"
