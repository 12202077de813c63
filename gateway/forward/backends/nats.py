"""NATS: one message per event, in the binary mode of the CloudEvents binding (1.0.3, section 3.1).

With JetStream (the default) a message is safe when the stream has acknowledged it, and `Nats-Msg-Id` is the event's id
(with its source in front when the device gave it), so that the stream drops what is sent twice within its duplicate
window. Core NATS (`jetstream = false`) confirms nothing: who is not listening misses the message.

A batch is sent at once on one connection, and the acknowledgements are awaited together; the server handles the
messages of one connection in order.
"""

import asyncio
import contextlib
import errno
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

import msgspec
from pydantic import Field, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import (
    BrokerSettings,
    Outcomes,
    event_attributes,
    os_error_text,
    percent_encoded,
    plain,
)
from gateway.forward.backends.publishing import BrokerSink
from gateway.forward.message import Message
from gateway.forward.secrets import Secret
from gateway.forward.template import Rules, Template
from gateway.net.address import address_text

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["NatsBackend", "NatsSettings", "connect_nats"]

SUBJECT_RULES = Rules(
    "subject",
    separators=".*> ",
    bytes_max=1024,
    legal=r"[^\s.*>]+(\.[^\s.*>]+)*",
    legal_text="levels are separated by single dots, without white space and wildcards",
)


class NatsSettings(BrokerSettings):
    """`[backends.NAME]` with `kind = "nats"`."""

    library = "nats"
    extra = "nats"
    ports: ClassVar = {"nats": 4222, "tls": 4222}

    kind: Literal["nats"]
    url: Annotated[
        str,
        Field(
            min_length=1,
            repr=False,
            description="The server, as nats://host:4222, or tls:// for TLS; user:password@ may stand in it.",
        ),
    ]
    subject: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            description="Subject to publish to; a template. Values may not hold . * > and spaces.",
        ),
    ]
    jetstream: Annotated[
        bool,
        Field(
            description="Whether a JetStream stream takes the messages and confirms them. false: core NATS, which "
            "confirms nothing and so serves only routes with ack = false."
        ),
    ] = True
    token: Annotated[
        Secret | None,
        Field(min_length=1, description="Token instead of user and password; or `token_file`."),
    ] = None
    commands: Annotated[
        bool,
        Field(
            description="Whether the node subscribes to devices.{realm}.{device}.down, names percent-encoded, and "
            "sends what arrives to the device as a command."
        ),
    ] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.token and (self.username or self.address.username):
            raise ValueError("token and a user name are given: keep one of the two")
        Template(self.subject, SUBJECT_RULES)
        return self

    @property
    def confirms(self) -> bool:
        """Whether it tells when a message is safe."""
        return self.jetstream


class _Connection(NamedTuple):
    client: "Client"
    acknowledgements: "_Acknowledgements"
    lost: "asyncio.Future[None]"


class NatsBackend(BrokerSink[_Connection]):
    """The sink of one route in one process."""

    def __init__(self, name: str, settings: NatsSettings, content_type: str, _stdout_lock: Path) -> None:
        super().__init__(
            name,
            settings,
            Template(settings.subject, SUBJECT_RULES),
            _disconnect,
            faults=_faults,
            explain=_explain,
            secrets=[plain(settings.token)],
        )
        self._settings = settings
        self._content_type = percent_encoded(content_type)

    async def _publish(
        self,
        connection: _Connection,
        batch: Sequence[Message],
        places: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> BackendUnavailable | None:
        payload_max = connection.client.max_payload
        fitting = []
        for index in some:
            if len(batch[index].payload) + HEADERS_BYTES_MAX > payload_max:
                outcomes.refuse(index, f"it is longer than the server allows (max_payload {payload_max})")
            else:
                fitting.append(index)
        send = self._send_acknowledged if self._settings.jetstream else self._send
        return await send(connection, batch, places, outcomes, fitting)

    async def _send_acknowledged(
        self,
        connection: _Connection,
        batch: Sequence[Message],
        subjects: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> BackendUnavailable | None:
        acknowledgements = connection.acknowledgements
        acknowledgements.forget()
        for index in some:
            message = batch[index]
            await connection.client.publish(
                subjects[index],
                message.payload,
                reply=acknowledgements.reply_to(index),
                headers=self._headers(message),
            )
        await acknowledgements.all(connection.lost)
        error: BackendUnavailable | None = None
        for index, fault in acknowledgements.received.items():
            if fault:
                error = error or self._link.unavailable(NatsFault(fault))
            else:
                outcomes.safe(index)
        if connection.lost.done():
            error = error or self._link.unavailable(ConnectionResetError(errno.ECONNRESET, "lost"))
            self._link.drop(connection)
        return error

    async def _send(
        self,
        connection: _Connection,
        batch: Sequence[Message],
        subjects: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> None:
        for index in some:
            message = batch[index]
            await connection.client.publish(subjects[index], message.payload, headers=self._headers(message))
        # A flush that comes back says that the server has read everything before it.
        await connection.client.flush(timeout=FLUSH_S)
        for index in some:
            outcomes.safe(index)

    def _headers(self, message: Message) -> dict[str, str]:
        headers = {f"ce-{key}": percent_encoded(value) for key, value in event_attributes(message).items()}
        headers["ce-datacontenttype"] = self._content_type
        # An id that a device gave is its own alone: another device's message with the same one must not be dropped.
        is_ours = message.message_id is None
        headers["Nats-Msg-Id"] = headers["ce-id"] if is_ours else f"{headers['ce-source']}/{headers['ce-id']}"
        return headers

    async def _connect(self) -> _Connection:
        client, lost = await connect_nats(self._name, self._settings)
        acknowledgements = _Acknowledgements(client.new_inbox())
        if self._settings.jetstream:
            try:
                await client.subscribe(acknowledgements.subject, cb=acknowledgements.take)
            except BaseException:
                await client.close()
                raise
        return _Connection(client, acknowledgements, lost)


class NatsFault(Exception):
    """JetStream did not take a message."""


class _Acknowledgements:
    """What JetStream says to the messages of a batch, each under a reply subject of its own.

    The library's own `publish_async` waits for ever when the answer is an error, so it is not used.
    """

    def __init__(self, inbox: str) -> None:
        self.subject = f"{inbox}.*"
        self._inbox = inbox
        self._serial = 0
        self._waiting: dict[str, int] = {}
        self._changed = asyncio.Event()
        self.received: dict[int, str] = {}
        """Index of a message -> what was wrong, empty when it is safe."""

    def forget(self) -> None:
        """Begin a batch; what comes late for the one before is not looked at."""
        self._waiting.clear()
        self.received = {}

    def reply_to(self, index: int) -> str:
        """The reply subject for a message."""
        self._serial += 1
        token = str(self._serial)
        self._waiting[token] = index
        return f"{self._inbox}.{token}"

    async def all(self, lost: "asyncio.Future[None]") -> None:
        """Return when every message has its answer, or the connection is lost."""
        lost.add_done_callback(self._wake)
        try:
            while self._waiting and not lost.done():
                self._changed.clear()
                await self._changed.wait()
        finally:
            lost.remove_done_callback(self._wake)

    async def take(self, answer: "Msg") -> None:
        """One answer of the server."""
        index = self._waiting.pop(answer.subject.rpartition(".")[2], None)
        if index is not None:
            self.received[index] = _fault_of(answer)
            self._changed.set()

    def _wake(self, _lost: "asyncio.Future[None]") -> None:
        self._changed.set()


def _fault_of(answer: "Msg") -> str:
    if answer.headers and answer.headers.get("Status") == "503":
        return "no JetStream stream takes the subject: create one whose subjects hold it"
    try:
        said = msgspec.json.decode(answer.data, type=_PubAck)
    except msgspec.DecodeError:
        return "what it answers is no acknowledgement of JetStream"
    if said.error is not None:
        return f"JetStream: {said.error.description or said.error.code}"
    return "" if said.stream else "what it answers is no acknowledgement of JetStream"


class _ApiError(msgspec.Struct):
    code: int = 0
    description: str = ""


class _PubAck(msgspec.Struct):
    """The answer of JetStream to a message, as far as it is needed (type io.nats.jetstream.api.v1.pub_ack_response)."""

    stream: str = ""
    error: _ApiError | None = None


HEADERS_BYTES_MAX: Final = 2048
"""Room for the headers, which count against the server's max_payload."""
FLUSH_S: Final = 10


async def connect_nats(name: str, settings: NatsSettings) -> "tuple[Client, asyncio.Future[None]]":
    """A connection that does not reconnect by itself, and a future that is done when it is lost.

    Raises BackendUnavailable and what the library raises.
    """
    from nats.aio.client import Client

    address = settings.address
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def on_lost() -> None:
        if not lost.done():
            lost.set_result(None)

    async def on_error(exc: Exception) -> None:
        if not failed.done():
            failed.set_result(exc)

    client = Client()
    connecting = asyncio.get_running_loop().create_task(
        client.connect(
            f"{address.scheme}://{address_text(address.host, address.port)}",
            name=f"psk-gateway {name}",
            allow_reconnect=False,
            connect_timeout=math.ceil(settings.connect_timeout_s),
            tls=settings.tls_context(name) if address.scheme == "tls" else None,
            tls_hostname=address.host if address.scheme == "tls" else None,
            user=settings.username or address.username,
            password=plain(settings.password) or address.password,
            token=plain(settings.token),
            disconnected_cb=on_lost,
            closed_cb=on_lost,
            error_cb=on_error,
            pending_size=PENDING_BYTES_MAX,
        )
    )
    try:
        # The library tries again for ever, and tells only the callback what went wrong.
        either: list[asyncio.Future[Any]] = [connecting, failed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            connecting.cancel()
        await connecting
    except asyncio.CancelledError:
        await _give_up(client, connecting)
        if failed.done():
            raise failed.result() from None
        raise
    except BaseException:
        await _give_up(client, connecting)
        raise
    return client, lost


async def _give_up(client: "Client", connecting: "asyncio.Task[None]") -> None:
    connecting.cancel()
    await asyncio.wait([connecting])
    if not connecting.cancelled():
        connecting.exception()
    with contextlib.suppress(AttributeError):  # older versions close what was never opened
        await client.close()


PENDING_BYTES_MAX: Final = 64 * 1024 * 1024
"""What the library holds before it waits for the socket; a batch is smaller."""


async def _disconnect(connection: _Connection) -> None:
    await connection.client.close()


def _faults() -> tuple[type[BaseException], ...]:
    import nats.errors

    return nats.errors.Error, OSError, ValueError, TimeoutError


def _explain(exc: BaseException) -> str:
    import nats.errors

    if isinstance(exc, nats.errors.AuthorizationError) or "authorization violation" in str(exc).lower():
        return "it does not accept the credentials: check username, password, token and url"
    if isinstance(exc, NatsFault):
        return str(exc)
    if isinstance(exc, ValueError):
        return "it does not speak the NATS protocol"
    return os_error_text(exc).removeprefix("nats: ")
