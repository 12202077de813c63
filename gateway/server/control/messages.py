"""What the supervisor, its children and gatewayctl say to each other, over the channels of `channel.py`."""

import msgspec

from gateway.registry.notices import Changed, Published
from gateway.server.control.trace_messages import (
    KeyLogLine,
    StartTrace,
    StopTrace,
    TraceEvents,
    TraceOver,
    TraceStarted,
)
from gateway.telemetry.aggregate import Family

__all__ = [
    "Alive",
    "CheckReaders",
    "Collect",
    "CommandDelivered",
    "CommandOutcome",
    "Configure",
    "CountLoad",
    "DeadLetterInfo",
    "DeadLetters",
    "DiscardDeadLetters",
    "Done",
    "Drain",
    "DrainNode",
    "EndSession",
    "EndSessions",
    "FollowerStatus",
    "Kick",
    "ListDeadLetters",
    "ListSessions",
    "Load",
    "Metrics",
    "Newcomers",
    "Reconfigure",
    "RetryDeadLetters",
    "SendCommand",
    "SessionClosed",
    "SessionInfo",
    "SessionOpened",
    "Sessions",
    "StandDown",
    "StandIn",
    "StopAccepting",
    "Subscribe",
    "Used",
]


class Configure(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a child, once, first: its settings as JSON; to a worker also its place and its listening sockets."""

    settings: bytes
    name: str = ""
    worker: int = 0
    workers: int = 1
    sockets: dict[str, int] = {}
    """listener name -> how many descriptors came beside this message, in this order; the worker accepts on all of them"""


class Reconfigure(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a worker: its settings as they are from now on; answered when they are in force.

    Of a listener that is in `sockets` the worker gets new descriptors, in this order, and lets go of those it has.
    """

    settings: bytes
    sockets: dict[str, int]


class Subscribe(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to one worker of the node: listen for what brokers send to devices."""


class StopAccepting(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a worker: accept no more connections, and listen to no broker's commands. Sessions stay."""


class StandIn(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a worker: accept on the sockets of a worker that is lost as well; `sockets` as in `Configure`."""

    worker: str
    sockets: dict[str, int]


class StandDown(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a worker: that other worker is back, let go of its sockets."""

    worker: str


class EndSessions(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a worker that accepts no more: end all sessions, spread over `within_s` seconds, and stay."""

    within_s: float


class DrainNode(msgspec.Struct, tag=True, frozen=True):
    """Operator: let this node run empty within `within_s` seconds."""

    within_s: float


class CountLoad(msgspec.Struct, tag=True, frozen=True):
    """Ask what a worker, or the node, still carries."""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Open connections, sessions among them, and messages in spools that no backend has confirmed."""

    connections: int
    sessions: int
    messages: int
    is_draining: bool = False


class Alive(msgspec.Struct, tag=True, frozen=True):
    """Worker to supervisor, in every tick: its event loop turns."""


class FollowerStatus(msgspec.Struct, tag=True, frozen=True):
    """What the follower knows, for readiness and logs. Times are Unix seconds, 0 for never."""

    state: str
    """`starting`, `copying`, `following`, `away` or `mismatch`"""
    detail: str
    sequence: int
    polled_at: float


class Collect(msgspec.Struct, tag=True, frozen=True):
    """Ask for the metrics of a process."""


class Metrics(msgspec.Struct, tag=True, frozen=True):
    """The metrics of a process."""

    families: list[Family]


class ListSessions(msgspec.Struct, tag=True, frozen=True):
    """Ask for live sessions, all or those of one realm, device name or route."""

    realm: str | None = None
    device: str | None = None
    route: str | None = None


class SessionInfo(msgspec.Struct, frozen=True):
    """One live session. `since` is Unix seconds; bytes are of payload; `messages` is None where there are only bytes."""

    session: str
    connection: str
    worker: str
    realm: str
    device: str
    identity: str
    address: str
    listener: str
    route: str
    tls_version: str
    cipher: str
    since: float
    received_bytes: int
    sent_bytes: int
    messages: int | None


class Sessions(msgspec.Struct, tag=True, frozen=True):
    """Live sessions."""

    sessions: list[SessionInfo]


class Kick(msgspec.Struct, tag=True, frozen=True):
    """End the sessions of a device, in an orderly way."""

    realm: str
    device: str


class SendCommand(msgspec.Struct, tag=True, frozen=True):
    """A command for a connected device, answered by a CommandOutcome after `timeout_s` seconds at most.

    The supervisor fills in the session that is to get it.
    """

    realm: str
    device: str
    id: str
    payload: bytes
    timeout_s: float
    session: str = ""


class CommandOutcome(msgspec.Struct, tag=True, frozen=True):
    """What became of a command.

    `delivered`: the device's TCP has it all. `not_connected`: there is no session of the device. `refused`: its route
    or its framing cannot carry it. `unacknowledged`: sent, and not acknowledged in time. `lost`: the connection broke.
    """

    id: str
    state: str
    detail: str


class CommandDelivered(msgspec.Struct, tag=True, frozen=True):
    """A command that waited in the registry was delivered: it waits no longer."""

    device_id: int
    number: int


class ListDeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Ask for up to `limit` dead letters, of all routes or of one."""

    limit: int
    route: str | None = None


class DeadLetterInfo(msgspec.Struct, frozen=True):
    """One message that is not tried any more. Times are Unix seconds; `event` is the id that the backend would see."""

    id: str
    route: str
    realm: str
    device: str
    identity: str
    event: str
    received_at: float
    at: float
    reason: str
    payload: bytes


class DeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Dead letters, and how many there are in all."""

    letters: list[DeadLetterInfo]
    total: int


class RetryDeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Deliver the dead letters with these ids again, or all."""

    ids: list[str] | None
    route: str | None = None


class DiscardDeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Delete the dead letters with these ids, or all."""

    ids: list[str] | None
    route: str | None = None


class Used(msgspec.Struct, tag=True, frozen=True):
    """Worker to follower: credentials that were used today, by id, and when (Unix seconds)."""

    credentials: dict[int, float]


class Newcomers(msgspec.Struct, tag=True, frozen=True):
    """Worker to follower: identities that proved the key which their realm derives, as realm id, identity, address."""

    identities: list[tuple[int, str, str]]


class SessionOpened(msgspec.Struct, tag=True, frozen=True):
    """Worker to supervisor: a session of a device that may have `limit` of them on this node. `since` is Unix seconds."""

    device_id: int
    session: str
    since: float
    limit: int


class SessionClosed(msgspec.Struct, tag=True, frozen=True):
    """Worker to supervisor: a session that it was told of is gone."""

    device_id: int
    session: str


class EndSession(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to worker: a newer session took the place of this one, at `since` (Unix seconds)."""

    device_id: int
    session: str
    since: float


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Stop accepting, end all sessions within `drain_s` seconds, and exit.

    At once, as a gateway that stops does; or spread over the time, when others are there that devices can turn to.
    """

    drain_s: float
    is_spread: bool = False


class CheckReaders(msgspec.Struct, tag=True, frozen=True):
    """A worker died: free the places that it held in the replica."""


class Done(msgspec.Struct, tag=True, frozen=True):
    """A call succeeded; `count` things were touched."""

    count: int = 0


Message = (
    Configure
    | CheckReaders
    | Published
    | Changed
    | FollowerStatus
    | Collect
    | Metrics
    | ListSessions
    | Sessions
    | Kick
    | SendCommand
    | CommandOutcome
    | CommandDelivered
    | ListDeadLetters
    | DeadLetters
    | RetryDeadLetters
    | DiscardDeadLetters
    | Used
    | Newcomers
    | SessionOpened
    | SessionClosed
    | EndSession
    | StartTrace
    | TraceStarted
    | StopTrace
    | TraceEvents
    | KeyLogLine
    | TraceOver
    | Drain
    | DrainNode
    | EndSessions
    | StopAccepting
    | Subscribe
    | Reconfigure
    | CountLoad
    | Load
    | Alive
    | StandIn
    | StandDown
    | Done
)
"""`Published` and `Changed` are the notices of the registry's follower, sent as they are."""
