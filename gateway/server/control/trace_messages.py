"""What a trace of one device tells: the events of its connections, as they go over the control channel and into JSON.

Each has the id of its connection, which log and `list-sessions` have too, and its time in Unix seconds. None holds a key.
"""

import msgspec

__all__ = [
    "KeyLogLine",
    "StartTrace",
    "StopTrace",
    "TraceConnected",
    "TraceEnded",
    "TraceEvent",
    "TraceEvents",
    "TraceHello",
    "TraceIdentity",
    "TraceMessage",
    "TraceOutcome",
    "TraceOver",
    "TraceStarted",
]  # fmt: skip


class StartTrace(msgspec.Struct, tag=True, frozen=True):
    """Follow connections from an address, or of an identity or device name, in one realm or all, until `until` (Unix seconds).

    The supervisor gives the number. `wants_keys`: the lines of a key log too.
    """

    target: str
    until: float
    realm: str | None = None
    wants_keys: bool = False
    number: int = 0


class TraceStarted(msgspec.Struct, tag=True, frozen=True):
    """The trace runs, until `until` at most (Unix seconds)."""

    number: int
    until: float


class StopTrace(msgspec.Struct, tag=True, frozen=True):
    """Nobody listens any more."""

    number: int


class TraceOver(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to operator: the time of the trace is over."""

    number: int


class TraceConnected(msgspec.Struct, tag="connected", tag_field="event", frozen=True):
    """A connection was accepted."""

    connection: str
    at: float
    address: str
    listener: str


class TraceHello(msgspec.Struct, tag="hello", tag_field="event", frozen=True):
    """The ClientHello, whole: what the device offers, and what is allowed there."""

    connection: str
    at: float
    realm: str | None
    server_name: str | None
    versions: list[str]
    suites: list[str]
    allowed_suites: list[str]
    groups: list[str]
    alpn: list[str]
    psk_modes: list[str]
    identities: list[str]
    """TLS 1.3 alone has them in the hello."""
    hint: str | None
    """What a TLS 1.2 handshake is sent; None for none."""


class TraceMessage(msgspec.Struct, tag="message", tag_field="event", frozen=True):
    """A message of the handshake, or an alert, in the clear, cut at a bound; `length` is the whole one's."""

    connection: str
    at: float
    sent: bool
    version: int
    content_type: int
    length: int
    data: bytes


class TraceIdentity(msgspec.Struct, tag="identity", tag_field="event", frozen=True):
    """Who it says it is; `device` when the registry knows it. Not proved yet."""

    connection: str
    at: float
    identity: str
    device: str | None


class TraceOutcome(msgspec.Struct, tag="outcome", tag_field="event", frozen=True):
    """How the handshake ended, and what to do about it."""

    connection: str
    at: float
    outcome: str
    reason: str
    fix: str
    handshake_s: float
    tls_version: str
    cipher: str
    session: str
    route: str


class TraceEnded(msgspec.Struct, tag="ended", tag_field="event", frozen=True):
    """The connection is gone. Bytes are of payload."""

    connection: str
    at: float
    reason: str
    received_bytes: int
    sent_bytes: int


TraceEvent = TraceConnected | TraceHello | TraceMessage | TraceIdentity | TraceOutcome | TraceEnded


class TraceEvents(msgspec.Struct, tag=True, frozen=True):
    """Worker to operator, by way of the supervisor. `left_out` counts what a bound kept back since the last of these."""

    number: int
    events: list[TraceEvent]
    left_out: int = 0


class KeyLogLine(msgspec.Struct, tag=True, frozen=True):
    """Worker to operator, by way of the supervisor: one line in the NSS key log format."""

    number: int
    line: str = ""

    def __repr__(self) -> str:
        return f"KeyLogLine({self.number})"
