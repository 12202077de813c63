"""One device connection: the thin file that drives a socket, a TLS session and a route.

Theory of operation
-------------------
The stream reads and calls `data_received`; the TLS session takes the bytes and gives events; the route takes the data;
whatever all of that wants to send is flushed once, at the end. There is no task and no timer per connection, but for an
alert that is held back. Phases:

    HANDSHAKE --Established--> LIVE --close()--> CLOSING --> GONE
        '--------failure---------------------------^

In CLOSING everything is said (close_notify or alert, then FIN) and what still comes in is dropped, until the peer ends
its side or LINGER_S have passed: closing a socket with unread bytes would reset it, and the peer might never see why.
Deadlines are the worker's: `deadline` moves with the traffic, and `deadline_passed` is called when it is over.
"""

import random
from collections.abc import Sequence
from typing import Final

import structlog

from gateway.errors import ControlError, PeerError, PeerFault
from gateway.forward.message import UUID7_RANDOM_BITS, uuid7
from gateway.forward.session import DeviceInfo, RouteSession
from gateway.net.stream import Stream
from gateway.registry.records import RealmRecord
from gateway.server.admission.failures import Pair
from gateway.server.admission.handshake_report import failure_fields, outcome_of
from gateway.server.admission.limits import REFUSED_NETWORKS
from gateway.server.admission.listener import Listener
from gateway.server.admission.lookup import Resolution
from gateway.server.connections.connection_report import ended_event, session_info
from gateway.server.connections.ending import (
    CLOSING,
    GONE,
    HANDSHAKE,
    LIVE,
    STOP_S,
    EndingConnection,
)
from gateway.server.connections.services import Services
from gateway.server.connections.tracing import ConnectionTrace
from gateway.server.control.messages import SessionInfo
from gateway.server.sessions.bulk import BULK_BYTES
from gateway.server.sessions.routes import LiveRoute
from gateway.server.settings import ListenerSettings
from gateway.telemetry.metrics import OK, Outcome
from gateway.tls.contexts import RealmContexts
from gateway.tls.openssl import TlsFailure, TlsVersion
from gateway.tls.session import Established, Event, Failed, PskChoice, ServerSession
from gateway.wire.client_hello import ClientHello, OfferedPsk
from gateway.wire.proxy_protocol import ProxyHeader

__all__ = ["DeviceConnection"]

log = structlog.get_logger()

_NO_LABELS: Final[dict[str, str]] = {}
"""Of all sessions that have none."""

FAILED_AFTER_S: Final = 0.005
"""An alert leaves so long after the identity has come: what the look-up found takes some microseconds more or less, and
this many times more. A timer counts in milliseconds, which hides the rest."""


class DeviceConnection(EndingConnection):
    """A protocol for the event loop, the policy of its TLS session, and the device's end for its route."""

    __slots__ = (
        "_accepted_at",
        "_identified_at",
        "_in_flight",
        "_is_logged",
        "_listener",
        "_live_route",
        "_number",
        "_outcome",
        "_proxied",
        "_realm",
        "_reason",
        "_resolution",
        "_route",
        "_trace",
        "address",
        "cipher",
        "credential_id",
        "device",
        "device_id",
        "identity",
        "not_after",
        "realm",
        "realm_id",
        "received_bytes",
        "sent_bytes",
        "service_day",
        "session_id",
        "settled_at",
        "tls_version",
    )  # fmt: skip

    def __init__(self, listener: Listener, services: Services, proxied: ProxyHeader | None = None) -> None:
        """`proxied`: what the balancer in front has said, with the addresses of both ends."""
        super().__init__(services, ServerSession(self, services.hellos))
        self._listener = listener
        self._proxied = proxied
        self._route: RouteSession | None = None
        self._live_route: LiveRoute | None = None
        self._realm: RealmRecord | None = None
        self._resolution: Resolution | None = None
        self._trace: ConnectionTrace | None = None
        self._number = next(services.numbers)
        self._outcome = OK
        self._reason = ""
        self._accepted_at = 0.0
        self.settled_at = 0.0
        self._identified_at = 0.0
        self._in_flight = False
        self._is_logged = False
        self.address = ""
        self.realm = ""
        self.realm_id = 0
        self.device = ""
        self.device_id = 0
        self.credential_id = 0
        self.identity = ""
        self.session_id = ""
        self.not_after: float | None = None
        self.service_day = 0
        self.tls_version = ""
        self.cipher = ""
        self.received_bytes = 0
        self.sent_bytes = 0

    # From the event loop

    def connection_made(self, transport: Stream) -> None:  # type: ignore[override]  # asyncio's protocols take any
        """Admit the connection, or drop it."""
        services = self._services
        self._transport = transport
        proxied = self._proxied
        if proxied is None:
            self.address = address = transport.host
        else:
            self.address = address = proxied.source[0] if proxied.source else ""
        if services.tracers.active:
            self._session.watch = self._trace = services.tracers.accepted(self)
        now = services.now()
        if excess := services.limits.admit(address, now):
            self._refuse(excess)
            transport.abort()
            return
        self.phase = HANDSHAKE
        self._listener.connections += 1
        self._accepted_at = now
        self.deadline = now + services.handshake_timeout_s
        services.deadlines.add(self)

    def data_received(self, data: bytes) -> None:
        """Take what the device sent."""
        phase = self.phase
        if phase is LIVE:
            self._put_off_idle()
            if len(data) > BULK_BYTES:
                self._services.bulk.add(self._session)
        elif phase is not HANDSHAKE:
            return
        for event in self._session.receive(data):
            if type(event) is bytes:
                self._received(event)
            else:
                self._handle(event)
        if self.phase is not CLOSING:  # where everything is said, or held back
            self._flush()

    def eof_received(self) -> bool:
        """The peer's FIN. Stay open for what still has to be said to it."""
        if self.phase is not LIVE:
            return False
        if not self._peer_finished:
            self._device_finished(orderly=False)
        self._close_if_both_finished()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        if self.session_id:
            self._services.life.closed(self)
            self._services.commands.gone(self)  # before the socket is closed: what was acknowledged?
        phase, self.phase = self.phase, GONE
        if not self._accepted_at:
            return
        if phase is HANDSHAKE:
            self._handshake_ended(Outcome.PEER_CLOSED, "the peer closed the connection")
        services = self._services
        services.deadlines.discard(self)
        services.limits.release(self.address)
        if self._is_penalised:
            services.failures.released()
        self._listener.connections -= 1
        if self._is_logged or self._trace is not None:
            self._tell_end(exc)
        if self.session_id:
            assert self._route is not None
            self._route.device_lost()
            self._route = None
        if self._session in services.bulk.sessions:
            services.bulk.discard(self._session)
        self._session.free()

    def pause_writing(self) -> None:
        """The device reads slowly."""
        if self._route is not None:
            self._route.pause_sending()

    def resume_writing(self) -> None:
        """The device reads again."""
        if self._route is not None:
            self._route.resume_sending()

    # From the TLS session: its policy

    def contexts_for(self, hello: ClientHello) -> RealmContexts:
        """The hello is complete: from here on the handshake counts, and the realm is known."""
        surplus = self._services.limits.begin_handshake(self)
        self._in_flight = True
        if surplus is not None:
            surplus.make_room()
        self._realm = self._listener.realm_for(hello.server_name)
        tracers = self._services.tracers
        if tracers.active:
            self._trace = tracers.greeted(self, self._trace, hello, self._realm)
        if self._trace is None:
            return self._listener.contexts_for(self._realm)
        self._session.watch = self._trace
        contexts = self._listener.contexts_for(self._realm, is_watched=True)
        self._trace.greeted(hello, self._realm, contexts)
        return contexts

    def choose_psk(self, offered: Sequence[OfferedPsk]) -> PskChoice | None:
        """Whose key it is."""
        services = self._services
        self._identified_at = services.now()
        self._resolution = services.lookup.resolve(self._realm, offered, self.address, services.wall())
        if self._trace is not None:
            self._trace.identified((self._resolution or offered[0]).identity)
        hello = self._session.hello
        assert hello is not None
        if self._resolution is None and TlsVersion.TLS1_2 not in hello.versions:
            raise PeerError(
                PeerFault.UNKNOWN_PSK_IDENTITY,
                "no identity that a device can have: 1 to 128 bytes of UTF-8 without control characters",
            )
        return self._resolution

    # From the route: the device's end

    def send(self, data: bytes) -> None:
        """Encrypt and transmit."""
        if self.phase is not LIVE or self._finished:
            return
        live_route, size = self._live_route, len(data)
        assert live_route is not None
        self.sent_bytes += size
        live_route.sent_bytes.value += size
        self._put_off_idle()
        self._session.send(data)
        self._flush()

    def opened(self) -> None:
        """The deadline of the first message is met."""
        self._opening = False
        self._put_off_idle()

    # From the worker

    @property
    def is_live(self) -> bool:
        """Whether the handshake is done and nothing has ended the session."""
        return self.phase is LIVE

    @property
    def since(self) -> float:
        """When the handshake was done, Unix seconds."""
        return self._services.wall() - (self._services.now() - self.settled_at)

    @property
    def connection_id(self) -> str:
        """What joins all log lines of this connection; no other one of this node has it."""
        return f"{self._services.id_prefix}-{self._number:x}"

    @property
    def listener_settings(self) -> ListenerSettings:
        """What the listener that it came in by is set to."""
        return self._listener.settings

    @property
    def listener_name(self) -> str:
        """Where it came in."""
        return self._listener.name

    @property
    def route_name(self) -> str:
        """The route it has, empty for none."""
        return "" if self._live_route is None else self._live_route.name

    @property
    def messages(self) -> int | None:
        """Frames that came in, None where there are none."""
        return None if self._route is None else self._route.messages

    @property
    def listener(self) -> Listener:
        """Where the device has connected."""
        return self._listener

    @property
    def live_route(self) -> LiveRoute | None:
        """The route of a session."""
        return self._live_route

    def configuration_changed(self, services: Services) -> None:
        """A handshake ends under the configuration that is in force then; a session keeps the one it began with."""
        if self.phase is HANDSHAKE:
            self._services = services

    def deadline_passed(self) -> None:
        """The phase took too long. The deadline is not filed any more."""
        if self.phase is HANDSHAKE:
            self._handshake_ended(
                Outcome.TIMEOUT, f"no handshake within {self._services.handshake_timeout_s:g} s"
            )
            self._abort()
        elif self._last_words:
            self._say_last_words()
        elif self.phase is LIVE and not self._finished and self._route is not None:
            self._reason = self._reason or "timed out"
            log.info("session_timed_out", **self._names())
            self.close()
        else:
            self._abort()

    def stop(self, reason: str, within_s: float = STOP_S) -> None:
        """End the session in an orderly way: revoked, kicked, or the gateway stops.

        What is under way has `within_s` seconds to settle, then close_notify goes out all the same.
        """
        if self.phase is HANDSHAKE:
            self._handshake_ended(Outcome.TIMEOUT, f"no handshake in time: {reason}")
            self._abort()
        if self.phase is not LIVE:
            return
        log.info("session_stopped", **self._names(), reason=reason)
        self._reason = self._reason or reason
        self._stopping = True
        self._expect_within(within_s)
        assert self._route is not None
        self._route.stop()

    def make_room(self) -> None:
        """There are too many handshakes in flight, and this is the oldest of them."""
        self._handshake_ended(Outcome.RATE_LIMITED, "ended for a newer one: see limits.handshakes_in_flight")
        self._abort()

    @property
    def takes_commands(self) -> bool:
        """Whether it is live, on a route that has commands."""
        return (
            self.phase is LIVE
            and not self._finished
            and self._live_route is not None
            and self._live_route.is_framed
        )

    def send_command(self, command_id: str, payload: bytes) -> int:
        """Send a command; gives the mark that `has_acknowledged` takes. Raises ControlError or LimitReached."""
        if self.phase is not LIVE or self._finished or self._route is None:
            raise ControlError("the session is ending")
        self._route.send_command(command_id, payload)
        return self._transmitted

    def describe(self) -> SessionInfo:
        """For `gatewayctl list-sessions`."""
        return session_info(self, self._services.process)

    # Inside

    def _received(self, data: bytes) -> None:
        route, live_route, size = self._route, self._live_route, len(data)
        if self.phase is LIVE and route is not None:
            assert live_route is not None
            self.received_bytes += size
            live_route.received_bytes.value += size
            route.device_sent(data)

    def _handle(self, event: Event) -> None:
        if type(event) is Established:
            self._established(event)
        elif type(event) is Failed:
            self._failed(event.error)
        elif self.phase is LIVE and not self._peer_finished:
            self._device_finished(orderly=True)
            if self.phase is LIVE:
                self._close_if_both_finished()

    def _established(self, event: Established) -> None:
        """Both sides have proved the key: find the route and go live."""
        services = self._services
        resolution = self._resolution
        assert resolution is not None
        record, realm = resolution.record, self._realm
        assert record is not None, "a decoy key was proved"
        assert realm is not None
        self.tls_version = event.version
        self.cipher = event.cipher
        self.identity = identity = resolution.identity.decode("utf-8")
        self.device = identity if record.device == identity else record.device  # mostly one string, kept once
        route = services.routes.choose(self._listener.name, realm.name, record.group, identity, event.alpn)
        if route is None:
            self._handshake_ended(Outcome.NO_ROUTE, "no route matches: add one, or change `match`")
            self.phase = LIVE
            self._finished = True
            self._session.close()
            self._linger()
            return
        self.realm = realm.name
        self.realm_id = record.realm_id
        self.device_id = record.device_id
        self.credential_id = record.credential_id
        self._live_route = route
        randomness = random.getrandbits(UUID7_RANDOM_BITS)  # it tells sessions apart, and guards nothing
        self.session_id = uuid7(wall := services.wall(), randomness)
        self._handshake_ended(OK, "")
        self._listener.observe_handshake(self.settled_at - self._accepted_at)
        self.phase = LIVE
        assert self._transport is not None
        self._transport.is_newcomer = False
        self._receiving = True
        self._opening = route.has_opening
        within_s = services.idle_timeout_s
        if route.is_framed or route.has_opening:
            within_s = min(within_s, services.first_message_timeout_s)
        filed, self.deadline = self.deadline, self.settled_at + within_s
        if self.deadline < filed:
            services.deadlines.bring_forward(self)
        self.service_day = realm.service_day
        services.life.opened(self, record, realm, wall)
        self._route = route.open_session(
            self,
            DeviceInfo(
                realm.name,
                self.device,
                identity,
                record.group,
                self.session_id,
                record.labels or _NO_LABELS,
                self._socket_address("peername") if route.tells_addresses else None,
                self._socket_address("sockname") if route.tells_addresses else None,
            ),
        )
        self._resolution = self._session.hello = None  # what only the handshake needed
        self._identified_at = 0.0
        if route.is_framed:
            services.commands.connected(self)

    def _pair(self) -> Pair | None:
        """Who tried, from where: what a penalty is for."""
        resolution, realm = self._resolution, self._realm
        return None if resolution is None else (realm.id if realm else 0, resolution.identity, self.address)

    def _socket_address(self, which: str) -> tuple[str, int] | None:
        if self._proxied is not None:
            return self._proxied.source if which == "peername" else self._proxied.destination
        address = None if self._transport is None else self._transport.get_extra_info(which)
        return (address[0], address[1]) if isinstance(address, tuple) else None

    def _failed(self, error: PeerError | TlsFailure) -> None:
        """The session is over; what `output` holds is the alert."""
        if self.phase is HANDSHAKE:
            penalty_s = self._handshake_ended(outcome_of(error, self._resolution), str(error))
            if penalty_s:
                self._hold(penalty_s, is_penalty=True)
                return
            if self._resolution is not None:
                left_s = self._identified_at + FAILED_AFTER_S - self._services.now()
                self._hold(max(0.0, left_s), is_penalty=False)
                return
        elif self.phase is LIVE:
            self._reason = self._reason or str(error)
            log.info("session_failed", **self._names(), reason=str(error))
        self._linger()

    def _refuse(self, excess: str) -> None:
        """Count a connection that is not let in, and log it."""
        outcome = Outcome.ADDRESS_REFUSED if excess == REFUSED_NETWORKS else Outcome.RATE_LIMITED
        self._count(outcome)
        if self._trace is not None:
            self._trace.settled(outcome, f"limits.{excess}", 0.0)
        if self._services.connection_log.admits(outcome):
            log.info(
                "connection_refused",
                connection=self.connection_id,
                listener=self._listener.name,
                address=self.address,
                reason=f"limits.{excess}",
            )

    def _handshake_ended(self, outcome: Outcome, reason: str) -> float:
        """Count the handshake, exactly once, and log what an operator needs to put it right.

        Returns for how many seconds the alert has to be held back.
        """
        services = self._services
        if self._in_flight:
            self._in_flight = False
            services.limits.end_handshake(self)
        self.settled_at = services.now()
        if self._trace is not None:
            self._trace.settled(outcome, reason, self.settled_at - self._accepted_at)
        if outcome is OK:
            self._listener.count_handshake(outcome, self.tls_version, self.cipher)
            if services.failures.has_any:
                services.failures.proved(self._pair())
            self._is_logged = services.connection_log.logs_sessions
            if services.is_debugging:
                log.debug("session_started", **self._names())
            return 0.0
        self.phase = CLOSING
        self._outcome, self._reason = outcome, reason
        failure = services.failures.failed(self.address, self._pair(), outcome, self.settled_at)
        self._count(Outcome.RATE_LIMITED if failure.is_limited else outcome)
        self._is_logged = services.connection_log.admits(outcome, is_wanted=not failure.is_limited)
        if self._is_logged:
            log.info(
                "handshake_failed",
                connection=self.connection_id,
                listener=self._listener.name,
                address=self.address,
                outcome=outcome.value,
                reason=reason,
                **failure_fields(outcome, self._resolution, self._session),
            )
        return failure.hold_s

    def _device_finished(self, *, orderly: bool) -> None:
        """The device ended its side."""
        self._peer_finished = True
        if not self._finished:
            self._reason = self._reason or "the device closed"
        assert self._route is not None
        self._route.device_finished(orderly=orderly)

    def _tell_end(self, exc: Exception | None) -> None:
        services = self._services
        reason = self._reason or (str(exc) if exc else "the gateway closed")
        if self._trace is not None:
            self._trace.ended(reason)
        if not self._is_logged:
            return
        services.connection_log.ended(
            ended_event(self, self._outcome, reason, accepted_at=self._accepted_at, now=services.now())
        )

    def _names(self) -> dict[str, str]:
        """Who this is, in each log line about its session."""
        return {
            "connection": self.connection_id,
            "session": self.session_id,
            "device": self.device,
            "realm": self.realm,
            "address": self.address,
        }

    def _count(self, outcome: Outcome) -> None:
        self._listener.count_handshake(outcome, self.tls_version, self.cipher)
