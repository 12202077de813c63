"""Routes as a worker runs them: the backend's own connection, the metrics, and a session's way in."""

import asyncio
import time
from collections.abc import Callable, Container, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from gateway.errors import BackendUnavailable
from gateway.forward.backends import SINKS
from gateway.forward.backends.tcp import TcpBackend, TcpSettings
from gateway.forward.delivery import Attempt, DirectDelivery
from gateway.forward.framed import FramedSession, FramedTerms
from gateway.forward.mqtt import MqttSession
from gateway.forward.outbox import SpooledDelivery
from gateway.forward.rate import DeviceRates
from gateway.forward.relay import Relay
from gateway.forward.route import Route, RouteTable
from gateway.forward.session import DeviceInfo, RouteSession, StreamEnd
from gateway.forward.settings import RouteMatch
from gateway.telemetry.metrics import WorkerMetrics
from gateway.wire.framing import Reason
from gateway.wire.framings import FRAMINGS

__all__ = ["LiveRoute", "LiveRoutes", "Retired", "RouteSurroundings", "Spawn"]

log = structlog.get_logger()

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Runs a coroutine as a task that the worker owns."""


@dataclass(frozen=True, slots=True)
class RouteSurroundings:
    """What a worker lends to all of its routes."""

    metrics: WorkerMetrics
    spawn: Spawn
    soon: Callable[[Callable[[], None]], object]
    """Runs a function after what the event loop does now."""
    workers: int
    """Of the node: each may adopt the spools of one that is not there any more."""
    spool_dir: Path
    stdout_lock: Path


class LiveRoute:
    """One route of one worker."""

    is_framed = False
    tells_addresses = False
    """Whether its backend is told the addresses of both ends of a session."""
    has_opening = False
    """Whether a session begins with something that has to be whole before the deadline of the first message."""

    def __init__(self, route: Route, metrics: WorkerMetrics) -> None:
        self.name: Final = route.name
        self.received_bytes = metrics.received_bytes.labels(route.name)
        self.sent_bytes = metrics.sent_bytes.labels(route.name)
        self._observe_ok = metrics.backend_duration.labels(route.backend, "ok").observe
        self._observe_error = metrics.backend_duration.labels(route.backend, "error").observe
        self._backend_name = route.backend
        self._is_away = False

    def open_session(self, device: StreamEnd, info: DeviceInfo) -> RouteSession:
        """A session whose handshake is done."""
        raise NotImplementedError

    async def open(self) -> None:
        """Get the backend ready. A backend that is away is no error: sessions find it when it is back."""

    async def close(self) -> None:
        """Deliver what is pending and let go."""

    @property
    def spool(self) -> SpooledDelivery | None:
        """The spool of a spooled route."""
        return None

    def _backend_tried(self, duration_s: float, error: Exception | None) -> None:
        """Count a try, and log when the backend goes away or comes back: once, not per message."""
        if error is None:
            self._observe_ok(duration_s)
            if self._is_away:
                self._is_away = False
                log.info("backend_back", backend=self._backend_name, route=self.name)
            return
        self._observe_error(duration_s)
        if not self._is_away:
            self._is_away = True
            log.warning("backend_away", backend=self._backend_name, route=self.name, reason=str(error))


class StreamRoute(LiveRoute):
    """Bytes to a TCP service, one connection for each session."""

    def __init__(self, route: Route, settings: TcpSettings, around: RouteSurroundings) -> None:
        super().__init__(route, around.metrics)
        self._backend = TcpBackend(route.backend, settings)
        self.tells_addresses = settings.proxy_protocol
        self._spawn = around.spawn

    def open_session(self, device: StreamEnd, info: DeviceInfo) -> RouteSession:
        """Connect to the service at once: it may speak first."""
        relay = Relay(device, self)
        relay.begin(self._backend.towards(info), device.poller, self._spawn)
        return relay

    def backend_connected(self, duration_s: float) -> None:
        """The service took a connection."""
        self._backend_tried(duration_s, None)

    def backend_failed(self, duration_s: float, error: BackendUnavailable) -> None:
        """It did not."""
        self._backend_tried(duration_s, error)


class MqttRoute(StreamRoute):
    """MQTT to a broker, one connection for each session; only CONNECT is read."""

    has_opening = True

    def __init__(self, route: Route, settings: TcpSettings, around: RouteSurroundings) -> None:
        super().__init__(route, settings, around)
        metrics = around.metrics
        self._password = None if route.mqtt_password is None else route.mqtt_password.get_secret_value()
        self.connect_received = metrics.messages_received.labels(route.name).inc
        self._rejected = _rejections(route.name, metrics)

    def open_session(self, device: StreamEnd, info: DeviceInfo) -> RouteSession:
        """Wait for CONNECT, and connect to the broker then."""

        def begin(relay: Relay) -> None:
            relay.begin(self._backend.towards(info), device.poller, self._spawn)

        return MqttSession(device, info, self, password=self._password, begin=begin)

    def connect_refused(self, info: DeviceInfo, reason: Reason, detail: str) -> None:
        """Count a CONNECT that was refused, and say why."""
        self._rejected[reason]()
        log.info(
            "mqtt_connect_refused",
            route=self.name,
            device=info.device,
            realm=info.realm,
            session=info.session,
            reason=detail,
        )


class FramedRoute(LiveRoute):
    """Messages to a sink, shared by all sessions of the worker."""

    is_framed = True

    def __init__(
        self,
        route: Route,
        around: RouteSurroundings,
        *,
        message_bytes_max: int,
    ) -> None:
        metrics = around.metrics
        super().__init__(route, metrics)
        sink = SINKS[route.backend_settings.kind](
            route.backend, route.backend_settings, route.content_type, around.stdout_lock
        )
        self._delivery: DirectDelivery | SpooledDelivery
        if route.delivery == "spooled":
            self._delivery = SpooledDelivery(
                sink,
                around.spool_dir / route.name,
                route.spool,
                workers=around.workers,
                timeout_s=route.delivery_timeout_s,
                on_attempt=self._attempted,
                on_commit=metrics.outbox_commit_duration.labels(route.name).observe,
            )
        else:
            self._delivery = DirectDelivery(
                sink,
                on_attempt=self._attempted,
                timeout_s=route.delivery_timeout_s,
                replies=route.reply,
            )
        self._rates = DeviceRates(
            route.device_messages_per_s, route.device_bytes_per_s, message_bytes_max, time.monotonic
        )
        self._spawn = around.spawn
        self._message_bytes_max = message_bytes_max
        framing = FRAMINGS[route.framing]
        self._decoder = framing.decoder
        self._terms = FramedTerms(
            kind=route.payload_kind,
            ack=route.ack,
            log=self,
            wall=time.time,
            soon=around.soon,
            encode=framing.encode,
            has_message_ids=route.message_id is not None,
        )
        self.received = metrics.messages_received.labels(route.name).inc
        self._count_delivered = metrics.messages_delivered.labels(route.name, route.backend).inc
        self._count_reply_dropped = metrics.replies_dropped.labels(route.name).inc
        self._rejected = _rejections(route.name, metrics)

    def open_session(self, device: StreamEnd, info: DeviceInfo) -> RouteSession:
        """Take the device's frames."""
        return FramedSession(
            device,
            info,
            self._decoder(self._message_bytes_max),
            self._rates.limit(self._delivery, info),
            self._terms,
        )

    async def open(self) -> None:
        """Open the sink and begin to deliver."""
        try:
            await self._delivery.open()
        except BackendUnavailable as exc:
            self._backend_tried(0.0, exc)
        self._spawn(self._delivery.run())

    async def close(self) -> None:
        """Deliver what is pending, close the sink."""
        await self._delivery.aclose()

    @property
    def spool(self) -> SpooledDelivery | None:
        """The spool, when the route has one."""
        return self._delivery if isinstance(self._delivery, SpooledDelivery) else None

    def rejected(self, reason: Reason) -> None:
        """Count a refused frame."""
        self._rejected[reason]()

    def reply_dropped(self, why: str) -> None:
        """A reply that the framing cannot carry."""
        self._count_reply_dropped()
        log.debug("reply_dropped", route=self.name, reason=why)

    def _attempted(self, attempt: Attempt) -> None:
        self._backend_tried(attempt.duration_s, attempt.error)
        self._count_delivered(attempt.delivered)
        if attempt.refused:
            log.warning(
                "messages_refused",
                backend=self._backend_name,
                route=self.name,
                messages=attempt.refused,
                reason=attempt.refusal,
            )


@dataclass(frozen=True, slots=True)
class Retired:
    """A route that new sessions do not take any more. `is_gone`: it, or its backend, is not in the configuration."""

    route: LiveRoute
    is_gone: bool


class LiveRoutes:
    """All routes of a worker."""

    def __init__(
        self,
        table: RouteTable,
        around: RouteSurroundings,
        *,
        message_bytes_max: int,
    ) -> None:
        self._around = around
        self._message_bytes_max = message_bytes_max
        self._table = table
        self._live = {route.name: self._make(route) for route in table.routes}
        self._retired: list[LiveRoute] = []

    @property
    def alpn(self) -> tuple[bytes, ...]:
        """The ALPN protocols that routes ask for, best first."""
        return tuple(name.encode("ascii") for name in self._table.alpn_names)

    @property
    def waiting_messages(self) -> int:
        """Messages in spools that no backend has confirmed."""
        return sum(spool.messages for _, spool in self.spools())

    def change(self, table: RouteTable, backends: Container[str], message_bytes_max: int) -> list[Retired]:
        """Put another table in force for new sessions; gives the routes to `retire` when their sessions have ended.
        `backends` are the names of all that are configured.

        A route that differs in nothing but what it matches goes on as it is, with its sessions, sink and spool.
        """
        before, live = self._table, self._live
        is_same_size = message_bytes_max == self._message_bytes_max
        kept = {
            route.name: _without_match(route)
            for route in before.routes
            if is_same_size or not live[route.name].is_framed
        }
        self._table, self._message_bytes_max = table, message_bytes_max
        made: list[LiveRoute] = []
        self._live = {}
        for route in table.routes:
            if kept.get(route.name) == _without_match(route):
                self._live[route.name] = live[route.name]
            else:
                self._live[route.name] = self._make(route)
                made.append(self._live[route.name])
        for each in made:  # a backend that is away keeps no one waiting
            self._around.spawn(each.open())
        self._look_for_strays()
        retired = [
            Retired(live[route.name], route.name not in self._live or route.backend not in backends)
            for route in before.routes
            if live[route.name] is not self._live.get(route.name)
        ]
        self._retired += [each.route for each in retired]
        return retired

    async def retire(self, route: LiveRoute) -> None:
        """Deliver what a route that is not used any more has left, and let go of it."""
        await route.close()
        self._retired.remove(route)
        if route.spool is not None and not self._spools(route.name):
            self._unwatch(route.name)

    def _make(self, route: Route) -> LiveRoute:
        if isinstance(route.backend_settings, TcpSettings):
            make = MqttRoute if route.framing == "mqtt" else StreamRoute
            return make(route, route.backend_settings, self._around)
        made = FramedRoute(route, self._around, message_bytes_max=self._message_bytes_max)
        if made.spool is not None:
            self._watch(route.name, made.spool.bytes_max)
        return made

    def _watch(self, name: str, bytes_max: int) -> None:
        """Gauges of a spooled route: of all its spools, as those of the route before are delivered beside the new one's."""
        metrics = self._around.metrics
        metrics.outbox_bytes_max.labels(name).set(bytes_max)
        for gauge, read in (
            (metrics.outbox_messages, lambda: sum(each.messages for each in self._spools(name))),
            (metrics.outbox_bytes, lambda: sum(each.bytes for each in self._spools(name))),
            (metrics.outbox_dead, lambda: sum(each.dead_count for each in self._spools(name))),
            (metrics.outbox_damaged, lambda: sum(each.damaged_messages for each in self._spools(name))),
            (metrics.outbox_oldest, lambda: max((each.oldest_s for each in self._spools(name)), default=0.0)),
        ):
            gauge.labels(name).set_function(read)

    def _unwatch(self, name: str) -> None:
        metrics = self._around.metrics
        for gauge in (
            metrics.outbox_bytes_max,
            metrics.outbox_messages,
            metrics.outbox_bytes,
            metrics.outbox_dead,
            metrics.outbox_damaged,
            metrics.outbox_oldest,
        ):
            gauge.remove(name)

    def choose(
        self, listener: str, realm: str, group: str | None, identity: str, alpn: bytes
    ) -> LiveRoute | None:
        """The route of a session, or None: then it is refused."""
        route = self._table.choose(
            listener=listener,
            realm=realm,
            group=group,
            identity=identity,
            alpn=alpn.decode("latin-1") if alpn else None,
        )
        return None if route is None else self._live[route.name]

    async def open(self) -> None:
        """Open every route, and complain of spools that belong to none."""
        for route in self._live.values():
            await route.open()
        self._look_for_strays()

    async def close(self) -> None:
        """Close every route, delivering what is pending. One whose backend hangs does not keep the others."""
        routes = [*self._live.values(), *self._retired]
        await asyncio.gather(*(route.close() for route in routes))

    def spools(self, name: str | None = None) -> list[tuple[str, SpooledDelivery]]:
        """The spools of all routes, or of the one of this name, with that name; those of retired routes too."""
        routes = (*self._live.values(), *self._retired)
        return [
            (route.name, route.spool)
            for route in routes
            if route.spool is not None and name in (None, route.name)
        ]

    def _spools(self, name: str) -> list[SpooledDelivery]:
        return [spool for _, spool in self.spools(name)]

    def _look_for_strays(self) -> None:
        """Messages that were acknowledged on a route which is not there any more, or is not spooled any more."""
        spool_dir = self._around.spool_dir
        if not spool_dir.is_dir():
            return
        known = {name for name, _ in self.spools()}
        for folder in sorted(spool_dir.iterdir()):
            if folder.name not in known and any(folder.glob("*.db")):
                log.error(
                    "spool_without_route",
                    route=folder.name,
                    folder=str(folder),
                    advice=f'messages may wait there: configure a route {folder.name} with delivery = "spooled" until it is '
                    "empty, or remove the folder",
                )


def _rejections(route: str, metrics: WorkerMetrics) -> dict[Reason, Callable[[], None]]:
    """What counts a refused message, by why it is refused."""
    return {reason: metrics.messages_rejected.labels(route, reason.value).inc for reason in Reason}


def _without_match(route: Route) -> Route:
    return replace(route, match=RouteMatch())
