"""File descriptors: as many as the system gives, and some of them kept for what is not a connection.

A process without a free descriptor can neither accept a connection, not even to refuse it, nor open a backend. So a worker
lets in only as many connections as leave FILES_RESERVED free, whatever `limits.connections` says.
"""

import resource
from collections.abc import Iterable
from typing import Final

import structlog

from gateway.forward.settings import RouteSettings
from gateway.server.admission.limits import share
from gateway.server.admission.limits_settings import LimitsSettings

__all__ = ["allow_open_files", "connections_with_files", "open_files_needed"]

log = structlog.get_logger()

FILES_RESERVED: Final = 128
"""What a worker opens beside connections: listeners, replica, spools, backends, its control channel."""
_TO_A_SERVICE: Final = frozenset({"stream", "mqtt"})
"""Framings that open one more connection for each session."""


def allow_open_files(limits: LimitsSettings, routes: Iterable[RouteSettings], workers: int) -> None:
    """Take what the system allows, for this process and its children, and warn when it is too little.

    The usual soft limit of 1,024 is there for programs that call select(), which an event loop does not.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    possible = connections_with_files(routes)
    wanted = share(limits.connections, workers)
    if possible is not None and possible < wanted:
        log.warning(
            "few_open_files",
            allowed=most,
            connections_per_worker=possible,
            note=f"limits.connections asks for {wanted}: raise LimitNOFILE= of this service, or lower it",
        )


def open_files_needed(connections: int, workers: int) -> int:
    """What a worker opens with its share of `connections`: a stream session takes two."""
    return 2 * share(connections, workers) + FILES_RESERVED


def connections_with_files(routes: Iterable[RouteSettings]) -> int | None:
    """How many connections this process has descriptors for, 1 at least; None for any number."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return None
    files = 2 if any(route.framing in _TO_A_SERVICE for route in routes) else 1
    return max(1, (allowed - FILES_RESERVED) // files)
