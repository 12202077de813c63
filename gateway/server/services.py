"""What a worker lends to its connections."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.server.commands import CommandSender
from gateway.server.deadlines import Deadlines
from gateway.server.life import SessionLife
from gateway.server.limits import ConnectionLimits
from gateway.server.lookup import DeviceLookup
from gateway.server.routes import LiveRoutes
from gateway.server.settings import LimitsSettings

if TYPE_CHECKING:
    from gateway.server.ending import EndingConnection

__all__ = ["Services"]


@dataclasses.dataclass(slots=True)
class Services:
    """`now` is a monotonic clock, `wall` Unix seconds."""

    settings: LimitsSettings
    now: Callable[[], float]
    wall: Callable[[], float]
    limits: ConnectionLimits
    deadlines: "Deadlines[EndingConnection]"
    lookup: DeviceLookup
    routes: LiveRoutes
    life: SessionLife
    commands: CommandSender
    is_debugging: bool
    """Whether sessions are logged one by one; asked first, since a log call costs microseconds even when it is dropped."""
