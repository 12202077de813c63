"""Which route a session takes, and which combinations of settings make a route."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from pydantic import SecretStr

from gateway.errors import ConfigurationError
from gateway.forward.settings import BackendSettings, RouteMatch, RouteSettings, SpoolSettings
from gateway.wire.cloudevents import PayloadKind, payload_kind

__all__ = ["COMBINATIONS", "Combination", "Route", "RouteTable"]


class Combination(NamedTuple):
    """One valid way to set up a route. Of `ack` and `reply` each listed value is allowed; the first is the default."""

    framing: str
    backend: str
    """The kind; `KIND unconfirmed` when its settings say that it does not confirm."""
    delivery: str
    ack: tuple[bool, ...]
    reply: tuple[bool, ...]


_MESSAGES: Final = ("lines", "length16", "length32")
"""Framings that give messages."""
_CONFIRMING: Final = ("file", "http", "mqtt", "nats", "amqp", "redis", "kafka")
_UNCONFIRMED: Final = ("mqtt unconfirmed", "nats unconfirmed")

COMBINATIONS: Final = (
    Combination("stream", "tcp", "direct", ack=(False,), reply=(False,)),
    Combination("mqtt", "tcp", "direct", ack=(False,), reply=(False,)),
    *(
        Combination(framing, backend, delivery, ack=(True, False), reply=(False,))
        for framing in _MESSAGES
        for backend in _CONFIRMING
        for delivery in ("direct", "spooled")
    ),
    *(Combination(framing, "http", "direct", ack=(True,), reply=(True,)) for framing in _MESSAGES),
    *(
        Combination(framing, backend, "direct", ack=(False,), reply=(False,))
        for framing in _MESSAGES
        for backend in _UNCONFIRMED
    ),
)
"""The whole of what works together; everything else is refused. Of several rows that fit, the first gives the defaults."""


@dataclass(frozen=True, slots=True)
class Route:
    """A checked route, with its defaults filled in."""

    name: str
    match: RouteMatch
    framing: str
    delivery: str
    ack: bool
    reply: bool
    content_type: str
    payload_kind: PayloadKind
    message_id: str | None
    mqtt_password: SecretStr | None
    delivery_timeout_s: float
    device_messages_per_s: float
    device_bytes_per_s: float
    spool: SpoolSettings
    backend: str
    backend_settings: BackendSettings


class RouteTable:
    """The routes in the order of the configuration. Raises ConfigurationError for one that cannot work."""

    def __init__(self, routes: Iterable[RouteSettings], backends: Mapping[str, BackendSettings]) -> None:
        self.routes: Final = tuple(_check_route(settings, backends) for settings in routes)
        names = [route.name for route in self.routes]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"routes: two routes are named {name}: give one another name")
        self._choices = [(_Conditions(route.match), route) for route in self.routes]

    @property
    def alpn_names(self) -> tuple[str, ...]:
        """The ALPN protocols that routes ask for, in the order of the routes."""
        return tuple(dict.fromkeys(route.match.alpn for route in self.routes if route.match.alpn))

    def choose(
        self, *, listener: str, realm: str, group: str | None, identity: str, alpn: str | None
    ) -> Route | None:
        """The first route that matches, or None: then the session is refused. `alpn` is what was agreed on."""
        for conditions, route in self._choices:
            if conditions.met_by(listener, realm, group, identity, alpn):
                return route
        return None


class _Conditions:
    """A RouteMatch made ready: only what was given is compared."""

    __slots__ = ("_alpn", "_group", "_identity", "_listener", "_realm")

    def __init__(self, match: RouteMatch) -> None:
        self._listener = match.listener
        self._realm = match.realm
        self._group = match.group
        self._alpn = match.alpn
        self._identity = re.compile(fnmatch.translate(match.identity)).match if match.identity else None

    def met_by(self, listener: str, realm: str, group: str | None, identity: str, alpn: str | None) -> bool:
        return (
            (self._listener is None or self._listener == listener)
            and (self._realm is None or self._realm == realm)
            and (self._group is None or self._group == group)
            and (self._alpn is None or self._alpn == alpn)
            and (self._identity is None or self._identity(identity) is not None)
        )


def _check_route(settings: RouteSettings, backends: Mapping[str, BackendSettings]) -> Route:
    backend = backends.get(settings.backend)
    if backend is None:
        known = ", ".join(sorted(backends)) or "none yet"
        raise ConfigurationError(
            f"routes.{settings.name}.backend: there is no [backends.{settings.backend}] (there is: {known})"
        )
    if settings.delivery != "spooled" and settings.spool != SpoolSettings():
        raise ConfigurationError(
            f'routes.{settings.name}.spool: it has no effect: write delivery = "spooled", or remove it'
        )
    if settings.mqtt_password is not None and settings.framing != "mqtt":
        raise ConfigurationError(
            f'routes.{settings.name}.mqtt_password: it has no effect: write framing = "mqtt", or remove it'
        )
    if settings.reply and not getattr(backend, "replies", True):
        raise ConfigurationError(
            f"routes.{settings.name}.reply: backend {settings.backend} sends many messages at once and gets one answer: "
            'write mode = "binary" or "structured" there'
        )
    if settings.message_id is not None and settings.framing not in _MESSAGES:
        raise ConfigurationError(
            f"routes.{settings.name}.message_id: framing = {settings.framing} has no messages: remove it"
        )
    row = _find_combination(settings, _label(backend))
    return Route(
        name=settings.name,
        match=settings.match,
        framing=settings.framing,
        delivery=settings.delivery,
        ack=row.ack[0] if settings.ack is None else settings.ack,
        reply=settings.reply,
        content_type=settings.content_type,
        payload_kind=payload_kind(settings.content_type),
        message_id=settings.message_id,
        mqtt_password=settings.mqtt_password,
        delivery_timeout_s=settings.delivery_timeout_s,
        device_messages_per_s=settings.device_messages_per_s,
        device_bytes_per_s=settings.device_bytes_per_s,
        spool=settings.spool,
        backend=settings.backend,
        backend_settings=backend,
    )


def _label(backend: BackendSettings) -> str:
    """The backend as the table calls it."""
    return backend.kind if getattr(backend, "confirms", True) else f"{backend.kind} unconfirmed"


def _find_combination(settings: RouteSettings, kind: str) -> Combination:
    """Narrow the table down, one setting after the other; the first that leaves nothing is the wrong one."""
    rows = [row for row in COMBINATIONS if row.framing == settings.framing]
    given = f"framing = {settings.framing}"
    for field, value in (
        ("backend", kind),
        ("delivery", settings.delivery),
        ("ack", settings.ack),
        ("reply", settings.reply),
    ):
        left = [row for row in rows if value is None or value in _allowed(row, field)]
        if not left:
            allowed = sorted({_show(each) for row in rows for each in _allowed(row, field)})
            what = f"a backend of kind {kind}" if field == "backend" else f"{field} = {_show(value)}"
            raise ConfigurationError(
                f"routes.{settings.name}.{field}: {given} does not go with {what}, only with {' or '.join(allowed)}"
            )
        rows = left
        if value is not None:
            given += f", {field} = {_show(value)}"
    return rows[0]


def _allowed(row: Combination, field: str) -> tuple[object, ...]:
    value = getattr(row, field)
    return value if isinstance(value, tuple) else (value,)


def _show(value: object) -> str:
    """As it is written in TOML, without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)
