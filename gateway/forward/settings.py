"""The tables [[routes]] and [backends.NAME] of gateway.toml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from gateway.forward.backends.amqp import AmqpSettings
from gateway.forward.backends.file import FileSettings
from gateway.forward.backends.http import HttpSettings
from gateway.forward.backends.kafka import KafkaSettings
from gateway.forward.backends.mqtt import MqttSettings
from gateway.forward.backends.nats import NatsSettings
from gateway.forward.backends.redis import RedisSettings
from gateway.forward.backends.tcp import TcpSettings
from gateway.forward.secrets import Secret

__all__ = ["BackendSettings", "RouteMatch", "RouteSettings", "SpoolSettings"]

BackendSettings = Annotated[
    FileSettings
    | TcpSettings
    | HttpSettings
    | MqttSettings
    | NatsSettings
    | AmqpSettings
    | RedisSettings
    | KafkaSettings,
    Field(discriminator="kind"),
]
"""One backend; `kind` says which settings it has."""

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", strict=True)
]
"""A name that stands in log lines and metric labels."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=255)]

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 -- a grammar rule of RFC 9110 section 5.6.2, no password
MediaType = Annotated[
    str,
    StringConstraints(
        max_length=255, pattern=rf'^{_TOKEN}/{_TOKEN}( *; *{_TOKEN}=({_TOKEN}|"[^"\\\x00-\x1f\x7f]*"))*$'
    ),
]
"""A media type with optional parameters (RFC 9110 section 8.3.1)."""


class RouteMatch(BaseModel):
    """`match` of a route: a session matches when everything that is given here does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    realm: Annotated[Text | None, Field(description="The realm of the device.")] = None
    group: Annotated[Text | None, Field(description="The group of the device.")] = None
    identity: Annotated[
        Text | None,
        Field(
            description="A pattern for the whole identity: `*` any characters, `?` one, `[a-f]` one of these. "
            "Upper and lower case differ."
        ),
    ] = None
    listener: Annotated[Name | None, Field(description="The listener that the device connected to.")] = None
    alpn: Annotated[Text | None, Field(description="The protocol agreed on by ALPN.")] = None


class SpoolSettings(BaseModel):
    """`spool` of a route with `delivery = "spooled"`: what is acknowledged and not yet at the backend, on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sync: Annotated[
        Literal["full", "normal"],
        Field(
            description="`full`: an acknowledged message is on the disk, and a loss of power does not lose it. `normal`: "
            "the kernel has it; that survives a crash of the gateway, and not one of the machine."
        ),
    ] = "full"
    bytes_max: Annotated[
        int,
        Field(
            ge=1 << 20,
            le=1 << 40,
            description="Bytes that the route may keep on this node, its dead letters included, over all workers. A "
            "message counts its payload and 256 bytes. Past it messages are refused with `full`. A gibibyte holds "
            "three million small messages: an hour of backend outage at 800 a second.",
        ),
    ] = 1 << 30
    age_max_s: Annotated[
        float,
        Field(
            ge=1,
            le=10 * 366 * 86_400,
            allow_inf_nan=False,
            description="Seconds after which a message that could not be delivered is put with the dead letters. A week "
            "outlives a long weekend without anybody at the backend.",
        ),
    ] = 7 * 86_400.0
    device_share: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Part of `bytes_max` that one device may fill. A tenth lets one that runs wild be refused while "
            "all others go on. It is one worker's part of `bytes_max` that counts; one message always fits.",
        ),
    ] = 0.1


class RouteSettings(BaseModel):
    """`[[routes]]`: what happens to the payloads of the sessions that match. The first route that matches counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[Name, Field(description="Name of the route, the label `route` of its metrics.")]
    match: Annotated[
        RouteMatch, Field(description="Which sessions take this route. Default: all of them.")
    ] = RouteMatch()
    framing: Annotated[
        Literal["stream", "lines", "length16", "length32", "mqtt"],
        Field(
            description="`stream`: bytes flow both ways between device and backend. `lines`: each line is a message. "
            "`length16`, `length32`: each message follows its length, in 2 or 4 bytes, big-endian. `mqtt`: the device "
            "speaks MQTT with the broker behind the backend, under its own name."
        ),
    ]
    delivery: Annotated[
        Literal["direct", "spooled"],
        Field(
            description="`direct`: a message is safe when the backend has confirmed it. `spooled`: when it is on the disk "
            "of this node, from where it goes to the backend."
        ),
    ] = "direct"
    spool: Annotated[SpoolSettings, Field(description='The spool, with `delivery = "spooled"`.')] = (
        SpoolSettings()
    )
    delivery_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            allow_inf_nan=False,
            description="Seconds that the backend has to confirm a batch. Thirty are far more than a healthy one needs; "
            "after them the batch counts as failed.",
        ),
    ] = 30.0
    message_id: Annotated[
        Literal["prefix"] | None,
        Field(
            description="`prefix`: the first token of a message, up to the first space, is its id, so that consumers can "
            "drop what a device sends again."
        ),
    ] = None
    device_messages_per_s: Annotated[
        float,
        Field(
            ge=0,
            le=1_000_000,
            allow_inf_nan=False,
            description="Messages a second that one device may send, on average; ten seconds' worth may come at once. "
            "More is refused with `rate_limited`. 0: no limit. Counted in each worker.",
        ),
    ] = 0.0
    device_bytes_per_s: Annotated[
        float,
        Field(
            ge=0,
            le=1e12,
            allow_inf_nan=False,
            description="The same in bytes of payload.",
        ),
    ] = 0.0
    ack: Annotated[
        bool | None,
        Field(
            description="Whether each message that is safe is answered `ok N`. Default: yes, where the backend "
            "confirms."
        ),
    ] = None
    reply: Annotated[bool, Field(description="Whether the backend's answer goes back to the device.")] = False
    content_type: Annotated[
        MediaType,
        Field(
            description="What the payloads are: it decides how they are checked and "
            "how they stand in an event."
        ),
    ] = "application/octet-stream"
    mqtt_password: Annotated[
        Secret | None,
        Field(
            description='With `framing = "mqtt"`: the password that every CONNECT gets, beside the device\'s name as user '
            "name. Default: none, then the device's own is taken out, too."
        ),
    ] = None
    backend: Annotated[Name, Field(description="Name of the backend, as in `[backends.NAME]`.")]
