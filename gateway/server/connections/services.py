"""What a worker lends to its connections."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gateway.server.admission.failures import FailedHandshakes
from gateway.server.admission.limits import ConnectionLimits
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.admission.lookup import DeviceLookup
from gateway.server.connections.deadlines import Deadlines
from gateway.server.connections.life import SessionLife
from gateway.server.connections.tracing import Tracers
from gateway.server.sessions.bulk import BulkSessions
from gateway.server.sessions.commands import CommandSender
from gateway.server.sessions.routes import LiveRoutes
from gateway.telemetry.connection_log import ConnectionLog
from gateway.wire.hello_memory import HelloMemory

if TYPE_CHECKING:
    from gateway.server.connections.connection import DeviceConnection
    from gateway.server.connections.ending import EndingConnection
    from gateway.server.connections.proxied import ProxiedConnection

__all__ = ["Services"]


@dataclasses.dataclass(slots=True)
class Services:
    """`now` is a monotonic clock, `wall` Unix seconds; `later` runs something after so many seconds."""

    settings: LimitsSettings
    now: Callable[[], float]
    wall: Callable[[], float]
    later: Callable[[float, Callable[[], None]], object]
    limits: "ConnectionLimits[DeviceConnection]"
    failures: FailedHandshakes
    deadlines: "Deadlines[EndingConnection | ProxiedConnection]"
    lookup: DeviceLookup
    routes: LiveRoutes
    life: SessionLife
    commands: CommandSender
    is_debugging: bool
    """Whether sessions are logged one by one; asked first, since a log call costs microseconds even when it is dropped."""
    connection_log: ConnectionLog
    tracers: Tracers
    process: str
    """The name of the worker, as its log lines have it."""
    hellos: HelloMemory = dataclasses.field(default_factory=HelloMemory)
    bulk: BulkSessions = dataclasses.field(default_factory=BulkSessions)
    id_prefix: str = dataclasses.field(default_factory=lambda: os.urandom(4).hex())
    """Of the ids of connections: another one in each life of each worker."""
    numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    """The rest of these ids."""
    handshake_timeout_s: float = dataclasses.field(init=False)
    idle_timeout_s: float = dataclasses.field(init=False)
    first_message_timeout_s: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Take what is read for every connection and record out of the settings, where reading costs five times as much."""
        self.handshake_timeout_s = self.settings.handshake_timeout_s
        self.idle_timeout_s = self.settings.idle_timeout_s
        self.first_message_timeout_s = self.settings.first_message_timeout_s
