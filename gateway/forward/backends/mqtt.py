"""MQTT: one PUBLISH per message. Version 5 carries CloudEvents in binary mode (user properties), 3.1.1 structured JSON.

With QoS 1 (the default) a message is safe when the broker has sent PUBACK with a reason below 0x80. A broker that
speaks 3.1.1 has no reasons there: one that drops a message for its access rules acknowledges it all the same.

aiomqtt connects and drives the socket; PUBLISH and PUBACK go through the paho client beneath it, because aiomqtt drops
the reason codes of PUBACK and tells nobody who waits for one when the connection is lost. Each connection is a new,
clean session: what was not acknowledged is sent again by the caller and by nobody else.
"""

import asyncio
import errno
import re
import secrets
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import (
    BrokerSettings,
    Outcomes,
    event_attributes,
    os_error_text,
    plain,
)
from gateway.forward.backends.publishing import BrokerSink
from gateway.forward.message import Message, encode_message
from gateway.forward.template import Rules, Template
from gateway.wire.cloudevents import payload_kind

if TYPE_CHECKING:
    import aiomqtt
    from paho.mqtt.client import Client as PahoClient
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

__all__ = ["MqttBackend", "MqttSettings", "connect_mqtt", "new_mqtt_client"]

TOPIC_RULES = Rules(
    "topic",
    separators="/+#",
    bytes_max=65_535,  # MQTT 5.0 section 1.5.4
    legal=r"[^$+#][^+#]*",
    legal_text="it does not begin with $ and holds no wildcards",
)
INFLIGHT_MAX: Final = 500
"""PUBLISH packets without PUBACK; the broker's own bound (Receive Maximum) is kept as well."""
REFUSED_REASONS: Final = frozenset({0x90, 0x95, 0x99})
"""PUBACK reasons that say that this very message is at fault (MQTT 5.0 section 3.4.2.1): topic name invalid, packet too
large, payload format invalid. With the others, an operator or time can help.
"""
FAILURE: Final = 0x80


class MqttSettings(BrokerSettings):
    """`[backends.NAME]` with `kind = "mqtt"`."""

    library = "aiomqtt"
    extra = "mqtt"
    ports: ClassVar = {"mqtt": 1883, "mqtts": 8883}

    kind: Literal["mqtt"]
    url: Annotated[
        str,
        Field(
            min_length=1,
            repr=False,
            description="The broker, as mqtt://host:1883, or mqtts:// for TLS (port 8883); user:password@ may stand in it.",
        ),
    ]
    topic: Annotated[
        str,
        Field(
            min_length=1,
            max_length=65_535,
            description="Topic to publish to; a template. Values may not hold / + #",
        ),
    ]
    version: Annotated[
        Literal[5, "3.1.1"],
        Field(description='Version of the protocol: 5, or "3.1.1" for brokers that know no other.'),
    ] = 5
    qos: Annotated[
        Literal[0, 1],
        Field(
            description="1: the broker confirms each message. 0: it does not, which serves only routes with ack = false."
        ),
    ] = 1
    retain: Annotated[
        bool,
        Field(description="Whether the broker keeps the last message of each topic for new subscribers."),
    ] = False
    keepalive_s: Annotated[
        int, Field(ge=5, le=65_535, description="Seconds of silence after which the connection is probed.")
    ] = 30
    commands: Annotated[
        bool,
        Field(
            description="Whether the node subscribes to devices/{realm}/{device}/down, names percent-encoded, and "
            "sends what arrives to the device as a command."
        ),
    ] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        Template(self.topic, TOPIC_RULES)
        return self

    @property
    def confirms(self) -> bool:
        """Whether it tells when a message is safe."""
        return self.qos > 0


class MqttBackend(BrokerSink["_Publisher"]):
    """The sink of one route in one process."""

    def __init__(self, name: str, settings: MqttSettings, content_type: str, _stdout_lock: Path) -> None:
        template = Template(settings.topic, TOPIC_RULES)
        super().__init__(name, settings, template, _disconnect, faults=_faults, explain=_explain)
        self._settings = settings
        self._content_type = content_type
        self._kind = payload_kind(content_type)

    async def _publish(
        self,
        connection: "_Publisher",
        batch: Sequence[Message],
        places: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> BackendUnavailable | None:
        error: BackendUnavailable | None = None
        await connection.publish_all(
            [(index, places[index], *self._packet(batch[index])) for index in some],
            qos=self._settings.qos,
            retain=self._settings.retain,
        )
        for index, reason in connection.acknowledged.items():
            text = _REASONS.get(reason, hex(reason))
            if reason < FAILURE:
                outcomes.safe(index)
            elif reason in REFUSED_REASONS:
                outcomes.refuse(index, f"the broker refuses it: {text}")
            else:
                error = error or self._link.unavailable(RuntimeError(f"it does not take a message: {text}"))
        if connection.lost is not None:
            error = error or self._link.unavailable(connection.lost)
            self._link.drop(connection)
        return error

    def _packet(self, message: Message) -> "tuple[bytes, Properties | None]":
        if self._settings.version != 5:  # noqa: PLR2004 -- the protocol's version
            return encode_message(message, self._content_type, self._kind), None
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        properties.ContentType = self._content_type
        properties.UserProperty = list(event_attributes(message).items())
        return message.payload, properties

    async def _connect(self) -> "_Publisher":
        client = new_mqtt_client(self._name, self._settings)
        await connect_mqtt(client)
        return _Publisher(client)


class _Publisher:
    """A connected client that tells what became of each PUBLISH."""

    def __init__(self, client: "aiomqtt.Client") -> None:
        self.client = client
        self.acknowledged: dict[int, int] = {}
        """Index of a message of this batch -> reason code of its PUBACK."""
        self.lost: Exception | None = None
        paho: PahoClient = client._client  # noqa: SLF001 -- see the theory of operation
        self._paho = paho
        self._indices: dict[int, int] = {}  # packet identifier -> index
        self._changed = asyncio.Event()
        self._tell_aiomqtt_of_disconnect = paho.on_disconnect
        paho.on_publish = self._on_publish
        paho.on_disconnect = self._on_disconnect

    async def publish_all(
        self, packets: "list[tuple[int, str, bytes, Properties | None]]", *, qos: int, retain: bool
    ) -> None:
        """Send all, and return when all are acknowledged or the connection is lost."""
        self.acknowledged.clear()
        self._indices.clear()
        for index, topic, payload, properties in packets:
            info = self._paho.publish(topic, payload, qos, retain, properties)
            if info.rc != 0:
                self.lost = self.lost or ConnectionResetError("the connection was lost")
                break
            self._indices[info.mid] = index
        while len(self.acknowledged) < len(self._indices) and self.lost is None:
            self._changed.clear()
            await self._changed.wait()

    def _on_publish(
        self, _client: "PahoClient", _userdata: Any, mid: int, reason: "ReasonCode", _properties: "Properties"
    ) -> None:
        index = self._indices.get(mid)
        if index is not None:
            self.acknowledged[index] = reason.value
            self._changed.set()

    def _on_disconnect(self, *arguments: Any) -> None:
        self.lost = self.lost or ConnectionResetError(f"the connection was lost: {arguments[3]}")
        self._changed.set()
        if self._tell_aiomqtt_of_disconnect is not None:
            self._tell_aiomqtt_of_disconnect(*arguments)


def new_mqtt_client(name: str, settings: MqttSettings) -> "aiomqtt.Client":
    """A client for the broker, not connected. Its session is clean and its identifier of its own."""
    import aiomqtt
    from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY

    address = settings.address
    is_v5 = settings.version == 5  # noqa: PLR2004 -- the protocol's version
    context: ssl.SSLContext | None = None
    if address.scheme == "mqtts":
        context = settings.tls_context(name)
    return aiomqtt.Client(
        address.host,
        address.port,
        username=settings.username or address.username,
        password=plain(settings.password) or address.password,
        identifier=f"pskgw-{secrets.token_hex(8)}",
        protocol=aiomqtt.ProtocolVersion.V5 if is_v5 else aiomqtt.ProtocolVersion.V311,
        clean_session=None if is_v5 else True,
        clean_start=MQTT_CLEAN_START_FIRST_ONLY,
        timeout=settings.connect_timeout_s,
        keepalive=settings.keepalive_s,
        max_inflight_messages=INFLIGHT_MAX,
        tls_context=context,
    )


async def connect_mqtt(client: "aiomqtt.Client") -> None:
    """Connect, and fail at once when the broker closes the connection, for which aiomqtt waits in vain.

    Raises what aiomqtt raises, and ConnectionResetError.
    """
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    paho: PahoClient = client._client  # noqa: SLF001 -- see the theory of operation
    tell_aiomqtt = paho.on_disconnect

    def on_disconnect(*arguments: Any) -> None:
        if not closed.done():
            closed.set_result(None)
        if tell_aiomqtt is not None:
            tell_aiomqtt(*arguments)

    paho.on_disconnect = on_disconnect
    connecting = loop.create_task(client.__aenter__())
    try:
        either: list[asyncio.Future[Any]] = [connecting, closed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():  # a CONNACK that refuses comes together with the end of the connection
            await asyncio.wait([connecting], timeout=_CONNACK_GRACE_S)
        if not connecting.done():
            raise ConnectionResetError(errno.ECONNRESET, "closed before CONNACK")
        await connecting
    finally:
        if not connecting.done():
            connecting.cancel()
            await asyncio.wait([connecting])
        paho.on_disconnect = tell_aiomqtt


_CONNACK_GRACE_S: Final = 0.1


async def _disconnect(publisher: _Publisher) -> None:
    await publisher.client.__aexit__(None, None, None)


def _faults() -> tuple[type[BaseException], ...]:
    import aiomqtt

    return aiomqtt.MqttError, OSError, ValueError, TimeoutError


def _explain(exc: BaseException) -> str:
    import aiomqtt

    code = getattr(exc, "rc", None)
    code = getattr(code, "value", code)
    if isinstance(exc, aiomqtt.MqttError) and code in {4, 5, 0x86, 0x87}:  # CONNACK of 3.1.1 and of 5
        return "it does not accept the user name and password: check username, password and url"
    if isinstance(exc, aiomqtt.MqttError) and str(exc) == "Operation timed out":
        return "it took the connection and did not answer as a broker does"
    return re.sub(r"^\[[^]]*\] ?| ?\(_ssl\.c:\d+\)$", "", os_error_text(exc))


_REASONS: Final = {
    0x80: "unspecified error",
    0x83: "implementation specific error",
    0x87: "not authorized, look at the broker's access rules",
    0x90: "topic name invalid",
    0x91: "packet identifier in use",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x99: "payload format invalid",
}
"""MQTT 5.0 section 2.4."""
