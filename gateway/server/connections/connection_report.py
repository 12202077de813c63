"""What a connection tells of itself: to the log, once, when it ends, and to `gatewayctl list-sessions`."""

from typing import TYPE_CHECKING

import msgspec

from gateway.server.control.messages import SessionInfo
from gateway.telemetry.connection_log import ConnectionEnded
from gateway.telemetry.metrics import Outcome

if TYPE_CHECKING:
    from gateway.server.connections.connection import DeviceConnection

__all__ = ["ended_event", "session_info"]


def ended_event(
    connection: "DeviceConnection", outcome: Outcome, reason: str, *, accepted_at: float, now: float
) -> ConnectionEnded:
    """The event of a connection that is gone. `accepted_at` and `now` are of the clock of its handshake's end."""
    event = ConnectionEnded(
        connection=connection.connection_id,
        listener=connection.listener_name,
        address=connection.address,
        outcome=outcome.value,
        reason=reason,
        handshake_s=round(connection.settled_at - accepted_at, 6),
        device=connection.device,
        identity=connection.identity,
        tls_version=connection.tls_version,
        cipher=connection.cipher,
    )
    if not connection.session_id:
        return event
    return msgspec.structs.replace(
        event,
        session_s=round(now - connection.settled_at, 6),
        received_bytes=connection.received_bytes,
        sent_bytes=connection.sent_bytes,
        messages=connection.messages,
        realm=connection.realm,
        session=connection.session_id,
        route=connection.route_name,
    )


def session_info(connection: "DeviceConnection", worker: str) -> SessionInfo:
    """A live session of this worker."""
    return SessionInfo(
        session=connection.session_id,
        connection=connection.connection_id,
        worker=worker,
        realm=connection.realm,
        device=connection.device,
        identity=connection.identity,
        address=connection.address,
        listener=connection.listener_name,
        route=connection.route_name,
        tls_version=connection.tls_version,
        cipher=connection.cipher,
        since=connection.since,
        received_bytes=connection.received_bytes,
        sent_bytes=connection.sent_bytes,
        messages=connection.messages,
    )
