"""AMQP 0-9-1 (RabbitMQ): persistent messages with publisher confirms, CloudEvents in binary mode.

Attributes are headers with the prefix `cloudEvents_` (AMQP binding 1.0.3, section 3.1.3.1), `datacontenttype` is the
content type, the event's id is the message id as well. Messages are mandatory: one that no queue takes comes back, and
counts as not delivered, since an operator can bind a queue.

A batch is published at once on one channel, and the confirms are awaited together; a channel keeps order.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import (
    BrokerSettings,
    BrokerUrl,
    Outcomes,
    event_attributes,
    os_error_text,
    plain,
)
from gateway.forward.backends.publishing import BrokerSink
from gateway.forward.message import Message
from gateway.forward.template import Rules, Template

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange

__all__ = ["AmqpBackend", "AmqpSettings"]

ROUTING_KEY_RULES = Rules("routing key", separators=".*#", bytes_max=255)


class AmqpSettings(BrokerSettings):
    """`[backends.NAME]` with `kind = "amqp"`."""

    library = "aio_pika"
    extra = "amqp"
    ports: ClassVar = {"amqp": 5672, "amqps": 5671}
    path_allowed = True

    kind: Literal["amqp"]
    url: Annotated[
        str,
        Field(
            min_length=1,
            repr=False,
            description="The broker, as amqp://host:5672/VHOST, or amqps:// for TLS; user:password@ may stand in it. "
            "Without a path the virtual host is /.",
        ),
    ]
    exchange: Annotated[
        str,
        Field(
            max_length=255,
            description="Exchange to publish to; it must exist. Empty: the default one, whose routing key is a queue.",
        ),
    ] = ""
    routing_key: Annotated[
        str,
        Field(min_length=1, max_length=255, description="Routing key; a template. Values may not hold . * #"),
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        Template(self.routing_key, ROUTING_KEY_RULES)
        return self


class _Connection(NamedTuple):
    connection: "AbstractConnection"
    channel: "AbstractChannel"
    exchange: "AbstractExchange"


class AmqpBackend(BrokerSink[_Connection]):
    """The sink of one route in one process; a connection has found its exchange."""

    def __init__(self, name: str, settings: AmqpSettings, content_type: str, _stdout_lock: Path) -> None:
        template = Template(settings.routing_key, ROUTING_KEY_RULES)
        super().__init__(name, settings, template, _disconnect, faults=_faults, explain=_explain)
        self._settings = settings
        self._content_type = content_type

    async def _publish(
        self,
        connection: _Connection,
        batch: Sequence[Message],
        places: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> BackendUnavailable | None:
        error: BackendUnavailable | None = None
        confirms = await asyncio.gather(
            *(self._publish_one(connection, batch[index], places[index]) for index in some),
            return_exceptions=True,
        )
        for index, confirm in zip(some, confirms, strict=True):
            if confirm is None:
                outcomes.safe(index)
            elif isinstance(confirm, _faults()):
                error = error or self._link.unavailable(confirm)
            else:
                raise confirm
        if error is not None and connection.channel.is_closed:
            self._link.drop(connection)
        return error

    async def _publish_one(self, connection: _Connection, message: Message, routing_key: str) -> None:
        from aio_pika import DeliveryMode, Message as AmqpMessage

        await connection.exchange.publish(
            AmqpMessage(
                message.payload,
                headers={f"cloudEvents_{key}": value for key, value in event_attributes(message).items()},
                content_type=self._content_type,
                delivery_mode=DeliveryMode.PERSISTENT,
                message_id=message.event_id,
            ),
            routing_key,
            mandatory=True,
        )

    async def _connect(self) -> _Connection:
        import aio_pika

        address, settings = self._address_with_login, self._settings
        tls = address.scheme == "amqps"
        connection = await aio_pika.connect(
            host=address.host,
            port=address.port,
            login=address.username or "guest",
            password=address.password or "guest",
            virtualhost=address.path[1:] if len(address.path) > 1 else "/",
            ssl=tls,
            ssl_context=settings.tls_context(self._name) if tls else None,
            timeout=settings.connect_timeout_s,
            client_properties={"connection_name": f"psk-gateway {self._name}"},
        )
        try:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            if settings.exchange:
                exchange = await channel.get_exchange(settings.exchange, ensure=True)
            else:
                exchange = channel.default_exchange
        except BaseException:
            await connection.close()
            raise
        return _Connection(connection, channel, exchange)

    @property
    def _address_with_login(self) -> BrokerUrl:
        address, settings = self._settings.address, self._settings
        return address._replace(
            username=settings.username or address.username,
            password=plain(settings.password) or address.password,
        )


async def _disconnect(connection: _Connection) -> None:
    await connection.connection.close()


def _faults() -> tuple[type[BaseException], ...]:
    from aio_pika.exceptions import AMQPError, ChannelInvalidStateError

    # Garbage from the other end comes out of the library as whatever it made of it.
    return AMQPError, ChannelInvalidStateError, OSError, ValueError, TimeoutError, EOFError


def _explain(exc: BaseException) -> str:
    from aio_pika.exceptions import (
        AuthenticationError,
        DeliveryError,
        ProbableAuthenticationError,
        PublishError,
    )

    if isinstance(exc, AuthenticationError | ProbableAuthenticationError) or "ACCESS_REFUSED" in str(exc):
        return "it does not accept the user name and password: check username, password and url"
    if isinstance(exc, PublishError):
        return "no queue takes the message: bind one to the exchange for this routing key"
    if isinstance(exc, DeliveryError):
        return "it did not take a message: a queue is full"
    if isinstance(exc, ValueError | EOFError):
        return "it does not speak AMQP 0-9-1"
    return os_error_text(exc)
