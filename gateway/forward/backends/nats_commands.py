"""Commands from NATS: the subject `devices.*.*.down`, core NATS whatever the backend publishes with.

Levels are separated by dots there, so a dot in a name is written %2E. The header `Nats-Msg-Id` names the command.
A request is answered by nobody: what becomes of a command is in the metric.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.errors import BackendUnavailable
from gateway.forward.backends.nats import NatsSettings, connect_nats
from gateway.forward.command_source import ArrivedCommand, parse_levels

if TYPE_CHECKING:
    from nats.aio.msg import Msg

__all__ = ["listen_nats"]

SUBJECT = "devices.*.*.down"
PENDING_MESSAGES_MAX = 1024
"""What the library holds for us; we take each at once."""


async def listen_nats(
    name: str,
    settings: NatsSettings,
    deliver: Callable[[ArrivedCommand], None],
    subscribed: Callable[[], None],
    /,
) -> None:
    """A `command_source.Listen`."""
    from nats.errors import Error

    async def take(message: "Msg") -> None:
        if (command := _command(message)) is not None:
            deliver(command)

    try:
        client, lost = await connect_nats(name, settings)
        try:
            await client.subscribe(SUBJECT, cb=take, pending_msgs_limit=PENDING_MESSAGES_MAX)
            await client.flush()
            subscribed()
            await lost
        finally:
            await client.close()
    except (Error, OSError, ValueError, TimeoutError) as exc:
        raise BackendUnavailable(f"backend {name}: no commands from the server: {exc}") from exc
    raise BackendUnavailable(f"backend {name}: the server has closed the connection")


def _command(message: "Msg") -> ArrivedCommand | None:
    address = parse_levels(message.subject.split("."))
    if address is None:
        return None
    return ArrivedCommand(*address, message.data, (message.headers or {}).get("Nats-Msg-Id"))
