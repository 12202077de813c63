"""The traces that run on a worker: which connections they follow, and what each connection tells them.

Theory of operation. A tracer looks for an address, or for an identity (or the name of its device). An address is known when
a connection is accepted. An identity stands in a TLS 1.3 hello, and in TLS 1.2 comes with the key exchange, in the middle of
the handshake: until then a connection that may be the one is followed too, and what it told is held and thrown away when it
is another. So while an identity is traced, TLS 1.2 handshakes of all devices get a watched context, PENDING_MAX of them at a
time; with no tracer a connection costs one look at an empty dictionary.

Everything is bounded: connections a second, messages of a connection, bytes of a message. What is left out is counted.
Secrets are passed on for connections that are known to be the one, and never held.
"""

import ipaddress
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from gateway.registry.records import RealmRecord
from gateway.server.admission.advice import Facts, advice
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.admission.lookup import DeviceLookup
from gateway.server.control.trace_messages import (
    KeyLogLine,
    StartTrace,
    StopTrace,
    TraceConnected,
    TraceEnded,
    TraceEvent,
    TraceEvents,
    TraceHello,
    TraceIdentity,
    TraceMessage,
    TraceOutcome,
)
from gateway.server.settings import ListenerSettings
from gateway.telemetry.metrics import Outcome
from gateway.tls.contexts import RealmContexts
from gateway.token_bucket import TokenBucket
from gateway.wire.client_hello import HANDSHAKE, TLS_1_2, ClientHello, decode_chosen_suite
from gateway.wire.handshake_names import group_name, psk_mode_name, version_name
from gateway.wire.suites import suite_name

if TYPE_CHECKING:
    from gateway.server.connections.connection import DeviceConnection

__all__ = ["ConnectionTrace", "Tracers"]

CONNECTIONS_BURST: Final = 100
"""Connections that one tracer follows at once."""
CONNECTIONS_PER_S: Final = 20.0
"""And as a device, or a site behind one address, goes on connecting."""
PENDING_MAX: Final = 256
"""TLS 1.2 handshakes that are followed before they say who they are."""
MESSAGES_MAX: Final = 64
"""Of one connection; a whole handshake has about ten."""
MESSAGE_BYTES_MAX: Final = 4096
IDENTITIES_SHOWN: Final = 8


class _Tracer:
    """One trace as this worker has it."""

    def __init__(
        self, start: StartTrace, tell: "Callable[[TraceEvents | KeyLogLine], None]", now: float
    ) -> None:
        self.start = start
        self._tell = tell
        self._connections = TokenBucket(CONNECTIONS_PER_S, CONNECTIONS_BURST, now)
        self._left_out = 0
        try:
            self._address: str | None = ipaddress.ip_address(start.target).compressed
        except ValueError:
            self._address = None

    def is_address(self, address: str) -> bool:
        return self._address is not None and _plain_address(address) == self._address

    def is_realm(self, realm: RealmRecord | None) -> bool:
        return self.start.realm is None or (realm is not None and realm.name == self.start.realm)

    def admits(self, now: float) -> bool:
        """Whether one more connection is followed; if not, that is counted."""
        if self._connections.admits(now):
            return True
        self._left_out += 1
        return False

    def emit(self, events: list[TraceEvent], left_out: int = 0) -> None:
        left_out, self._left_out = left_out + self._left_out, 0
        self._tell(TraceEvents(self.start.number, events, left_out))

    def secret(self, line: str, now: float) -> None:
        if self.start.wants_keys and now < self.start.until:
            self._tell(KeyLogLine(self.start.number, line))


class Tracers:
    """All traces of one worker. `wall` gives Unix seconds."""

    def __init__(
        self,
        tell: "Callable[[TraceEvents | KeyLogLine], None]",
        lookup: DeviceLookup,
        limits: LimitsSettings,
        listeners: Sequence[ListenerSettings],
        wall: Callable[[], float],
    ) -> None:
        self.active: dict[int, _Tracer] = {}
        self.pending: set[ConnectionTrace] = set()
        self.lookup: Final = lookup
        self.limits = limits
        self.listeners = listeners
        self.wall: Final = wall
        self._tell = tell

    def change(self, limits: LimitsSettings, listeners: Sequence[ListenerSettings]) -> None:
        """The configuration has changed: advice goes by it from now on."""
        self.limits, self.listeners = limits, listeners

    def handle(self, message: StartTrace | StopTrace) -> None:
        """Follow one more target, or one less."""
        number = message.number
        if isinstance(message, StartTrace):
            self.active[number] = _Tracer(message, self._tell, self.wall())
            return
        self.active.pop(number, None)
        for trace in list(self.pending):
            trace.forget(number)

    def accepted(self, connection: "DeviceConnection") -> "ConnectionTrace | None":
        """A connection is there, and its address: is it one to follow? Asked only while there are tracers."""
        now = self.wall()
        found = [
            each for each in self.active.values() if each.is_address(connection.address) and each.admits(now)
        ]
        return ConnectionTrace(self, connection, found, ()) if found else None

    def greeted(
        self,
        connection: "DeviceConnection",
        trace: "ConnectionTrace | None",
        hello: ClientHello,
        realm: RealmRecord | None,
    ) -> "ConnectionTrace | None":
        """Its hello is whole: now it may be known, or may become known in this handshake."""
        now = self.wall()
        followed = set() if trace is None else {tracer.start.number for tracer in trace.found}
        others = [
            each
            for each in self.active.values()
            if each.start.number not in followed and each.is_realm(realm)
        ]
        named = [each for each in others if self._is_named(each, hello, realm)]
        may_come = TLS_1_2 in hello.versions and len(self.pending) < PENDING_MAX
        pending = [each for each in others if each not in named] if may_come else []
        named = [each for each in named if each.admits(now)]
        if trace is None:
            trace = ConnectionTrace(self, connection, named, pending) if named or pending else None
        else:
            trace.join(named, pending)
        return trace

    def _is_named(self, tracer: _Tracer, hello: ClientHello, realm: RealmRecord | None) -> bool:
        return any(
            self.is_target(tracer.start.target, psk.identity, realm) for psk in hello.psks[:IDENTITIES_SHOWN]
        )

    def is_target(self, target: str, identity: bytes, realm: RealmRecord | None) -> bool:
        """Whether an identity is the one, or one of the device of that name."""
        if identity == target.encode():
            return True
        record = None if realm is None else self.lookup.record(realm.id, identity)
        return record is not None and record.device == target


class ConnectionTrace:
    """One connection that is followed, or may have to be; a `Watch` of its TLS.

    `found` are the tracers that follow it; `_pending` those that do when it turns out to be theirs, and get all it told so far.
    """

    def __init__(
        self,
        tracers: Tracers,
        connection: "DeviceConnection",
        found: Sequence[_Tracer],
        pending: Sequence[_Tracer],
    ) -> None:
        self.found = list(found)
        self._pending = list(pending)
        self._tracers = tracers
        self._connection = connection
        self._id = connection.connection_id
        self._told: list[TraceEvent] = []
        self._chosen = ""
        self._messages = 0
        self._left_out = 0
        self._is_settled = False
        self._realm: RealmRecord | None = None
        self._hello: ClientHello | None = None
        self._identity = b""
        self._count_pending()
        self._tell(TraceConnected(self._id, tracers.wall(), connection.address, connection.listener_name))

    def join(self, found: Sequence[_Tracer], pending: Sequence[_Tracer]) -> None:
        """More tracers follow it, or may have to."""
        self._match(found)
        self._pending += pending
        self._count_pending()

    def forget(self, number: int) -> None:
        """A trace is over."""
        self._pending = [each for each in self._pending if each.start.number != number]
        self._count_pending()

    def greeted(self, hello: ClientHello, realm: RealmRecord | None, contexts: RealmContexts) -> None:
        """Its hello is whole."""
        self._hello, self._realm = hello, realm
        self._tell(
            TraceHello(
                self._id,
                self._tracers.wall(),
                None if realm is None else realm.name,
                hello.server_name,
                [version_name(version) for version in hello.versions],
                [suite_name(code) for code in hello.suites],
                contexts.suites,
                [group_name(code) for code in hello.groups],
                [protocol.decode("ascii", "backslashreplace") for protocol in hello.alpn],
                [psk_mode_name(mode) for mode in hello.psk_modes],
                [_shown(psk.identity) for psk in hello.psks[:IDENTITIES_SHOWN]],
                contexts.hint,
            )
        )

    def identified(self, identity: bytes) -> None:
        """It says who it is: whoever looks for another is gone from here."""
        self._identity = identity
        mine = [
            each
            for each in self._pending
            if self._tracers.is_target(each.start.target, identity, self._realm)
        ]
        now = self._tracers.wall()
        self._match([each for each in mine if each.admits(now)])
        self._drop_pending()
        record = None if self._realm is None else self._tracers.lookup.record(self._realm.id, identity)
        self._tell(TraceIdentity(self._id, now, _shown(identity), None if record is None else record.device))

    def message(self, *, sent: bool, version: int, content_type: int, data: bytes) -> None:
        """OpenSSL took or made a message."""
        if self._is_settled and content_type != ALERT:
            return  # tickets and key updates of a session say nothing of its handshake
        if self._messages == MESSAGES_MAX:
            self._left_out += 1
            return
        self._messages += 1
        if sent and content_type == HANDSHAKE and data[:1] == SERVER_HELLO:
            suite = decode_chosen_suite(data)
            self._chosen = "" if suite is None else suite_name(suite)
        self._tell(
            TraceMessage(
                self._id,
                self._tracers.wall(),
                sent,
                version,
                content_type,
                len(data),
                data[:MESSAGE_BYTES_MAX],
            )
        )

    def secret(self, line: str) -> None:
        """OpenSSL made a secret: for who follows this connection and may have it, nobody else."""
        now = self._tracers.wall()
        for tracer in self._running():
            tracer.secret(line, now)

    def settled(self, outcome: Outcome, reason: str, handshake_s: float) -> None:
        """The handshake is over, either way."""
        self._drop_pending()
        connection = self._connection
        self._tell(
            TraceOutcome(
                self._id,
                self._tracers.wall(),
                outcome.value,
                reason,
                advice(outcome, self._facts()) if self.found else "",
                round(handshake_s, 6),
                connection.tls_version,
                connection.cipher or self._chosen,
                connection.session_id,
                connection.route_name,
            )
        )
        self._is_settled = True

    def ended(self, reason: str) -> None:
        """The connection is gone."""
        self._drop_pending()
        connection = self._connection
        event = TraceEnded(
            self._id, self._tracers.wall(), reason, connection.received_bytes, connection.sent_bytes
        )
        for tracer in self._running():
            tracer.emit([event], self._left_out)

    def _facts(self) -> Facts:
        realm, listener = self._realm, self._connection.listener_settings
        return Facts(
            listener=listener,
            listeners=self._tracers.listeners,
            address=self._connection.address,
            realm=realm.name if realm is not None else (None if self._hello is not None else listener.realm),
            hello=self._hello,
            identity=_shown(self._identity),
            record=self._tracers.lookup.record(realm.id, self._identity)
            if realm and self._identity
            else None,
            handshake_timeout_s=self._tracers.limits.handshake_timeout_s,
        )

    def _running(self) -> list[_Tracer]:
        return [each for each in self.found if each.start.number in self._tracers.active]

    def _match(self, tracers: Sequence[_Tracer]) -> None:
        for tracer in tracers:
            tracer.emit(list(self._told))
        self.found += tracers

    def _drop_pending(self) -> None:
        if self._pending:
            self._pending = []
            self._count_pending()
        self._told = []

    def _count_pending(self) -> None:
        if self._pending:
            self._tracers.pending.add(self)
        else:
            self._tracers.pending.discard(self)

    def _tell(self, event: TraceEvent) -> None:
        for tracer in self._running():
            tracer.emit([event])
        if not self._is_settled:
            self._told.append(event)


ALERT: Final = 0x15
SERVER_HELLO: Final = b"\x02"


def _plain_address(address: str) -> str:
    """As `ipaddress` writes it; an IPv4 address that came over an IPv6 socket is that address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (parsed if mapped is None else mapped).compressed


def _shown(identity: bytes) -> str:
    return identity.decode("utf-8", "backslashreplace")
