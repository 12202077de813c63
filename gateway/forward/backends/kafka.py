"""Kafka: one record per message, by an idempotent producer; CloudEvents in binary mode (headers `ce_...`).

The key of a record is the device's name, so that the messages of a device stay in one partition, in order; the
partitioner is that of the Java clients. A message is safe when all replicas that are in sync have it (acks=all).

Theory of operation. librdkafka has threads and queues of its own and sends again by itself, so a batch is handed over
and awaited in one thread of the sink. A producer on which a message failed, or whose delivery was cancelled, may still
hold messages: it is purged and thrown away, and the next delivery makes a new one. So nothing is sent behind the back
of the caller, who sends again what was not confirmed, in order.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import (
    CredentialSettings,
    Outcomes,
    TlsSettings,
    event_attributes,
    masked,
    plain,
    render_all,
    require_library,
)
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from gateway.forward.template import Rules, Template

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Producer

__all__ = ["KafkaBackend", "KafkaSettings"]

TOPIC_RULES = Rules(
    "topic",
    separators=".",
    bytes_max=249,
    legal=r"(?!\.{1,2}$)[A-Za-z0-9._-]+",
    legal_text="only letters, digits, '.', '_' and '-' are allowed",
)
POLL_S: Final = 0.05

T = TypeVar("T")


class KafkaSettings(CredentialSettings, TlsSettings):
    """`[backends.NAME]` with `kind = "kafka"`."""

    kind: Literal["kafka"]
    brokers: Annotated[
        tuple[
            Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")],
            ...,
        ],
        Field(min_length=1, max_length=100, description="Brokers to begin with, each as host:port."),
    ]
    topic: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            description="Topic; a template. Values may not hold . and what topics may not.",
        ),
    ]
    tls: Annotated[bool, Field(description="Whether the brokers are spoken to by TLS.")] = False
    sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"],
        Field(description="How `username` and `password` are shown, when they are given."),
    ] = "SCRAM-SHA-512"
    compression: Annotated[
        Literal["none", "gzip", "lz4", "zstd"], Field(description="How batches are compressed.")
    ] = "none"
    message_timeout_s: Annotated[
        float,
        Field(
            ge=1,
            le=300,
            description="Seconds in which a message must be confirmed, the library's own tries included. Shorter than "
            "the route's delivery_timeout_s, so that the reason is known.",
        ),
    ] = 20.0
    connect_timeout_s: Annotated[
        float, Field(gt=0, le=300, description="Seconds that the first answer of a broker may take.")
    ] = 10.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_library("confluent_kafka", "kafka")
        self.check_tls_is_used(uses_tls=self.tls, how="tls = true")
        if self.username and self.password is None:
            raise ValueError("username is given without password: add password or password_file")
        Template(self.topic, TOPIC_RULES)
        return self


class KafkaBackend:
    """The sink of one route in one process."""

    def __init__(self, name: str, settings: KafkaSettings, content_type: str, _stdout_lock: Path) -> None:
        self._name = name
        self._settings = settings
        self._content_type = content_type
        self._topic = Template(settings.topic, TOPIC_RULES)
        self._thread: ThreadPoolExecutor | None = None
        self._producer: Producer | None = None
        self._trouble = ""

    async def open(self) -> None:
        """Find a broker. Raises BackendUnavailable."""
        await self._in_thread(self._find_broker)

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        """Hand the batch to the producer, and await that it was confirmed."""
        outcomes = Outcomes(len(batch))
        topics = render_all(self._topic, batch, outcomes)
        if not outcomes.open:
            return outcomes.receipt()
        given_up = threading.Event()
        try:
            return await self._in_thread(self._send, batch, topics, outcomes, given_up)
        finally:
            given_up.set()  # when cancelled: the thread ends soon, and the next call waits for that

    async def close(self) -> None:
        """Let go of the producer. Closing twice is allowed."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._discard)
        finally:
            thread.shutdown(wait=False)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        from confluent_kafka import KafkaException

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"backend-{self._name}")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)
        except KafkaException as exc:
            raise self._unavailable(exc.args[0]) from exc

    # In the thread

    def _find_broker(self) -> None:
        producer = self._producer or self._new_producer()
        try:
            producer.list_topics(timeout=self._settings.connect_timeout_s)
        except BaseException:
            producer.poll(0)  # the callback with the reason
            self._discard()
            raise

    def _send(
        self, batch: Sequence[Message], topics: list[str], outcomes: Outcomes, given_up: threading.Event
    ) -> Receipt | None:
        from confluent_kafka import KafkaError, KafkaException

        producer = self._producer or self._new_producer()
        errors: list[KafkaError] = []
        waiting = set(outcomes.open)

        def delivered(index: int, error: "KafkaError | None", _record: Any) -> None:
            waiting.discard(index)
            if error is None:
                outcomes.safe(index)
            elif error.code() in {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG}:
                outcomes.refuse(index, f"the broker refuses it: {error.str()}")
            else:
                errors.append(error)

        for index in outcomes.open:
            message = batch[index]
            try:
                producer.produce(
                    topics[index],
                    message.payload,
                    message.device.encode(),
                    headers=self._headers(message),
                    on_delivery=functools.partial(delivered, index),
                )
            except KafkaException as exc:  # too large for this producer
                delivered(index, exc.args[0], None)
            except BufferError:
                break  # its queue is full: the rest is not settled
        deadline = time.monotonic() + self._settings.message_timeout_s + 1
        while waiting and not given_up.is_set() and not errors and time.monotonic() < deadline:
            producer.poll(POLL_S)
        if not outcomes.open:
            return outcomes.receipt()
        self._discard()
        error = (
            self._unavailable(errors[0])
            if errors
            else BackendUnavailable(self._said(self._trouble or "it did not confirm in time"))
        )
        return outcomes.receipt(error)

    def _headers(self, message: Message) -> list[tuple[str, str | bytes | None]]:
        headers: list[tuple[str, str | bytes | None]] = [
            (f"ce_{key}", value.encode()) for key, value in event_attributes(message).items()
        ]
        headers.append(("content-type", self._content_type.encode()))
        return headers

    def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()
            producer.flush(FLUSH_S)

    def _new_producer(self) -> "Producer":
        from confluent_kafka import Producer

        self._trouble = ""
        self._producer = Producer(self._configuration(), logger=_SILENT)
        return self._producer

    def _configuration(self) -> dict[str, Any]:
        settings = self._settings
        configuration: dict[str, Any] = {
            "bootstrap.servers": ",".join(settings.brokers),
            "client.id": f"psk-gateway-{self._name}",
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": "murmur2_random",
            "linger.ms": 0,
            "compression.type": settings.compression,
            "message.timeout.ms": int(settings.message_timeout_s * 1000),
            "request.timeout.ms": int(min(settings.message_timeout_s, REQUEST_S) * 1000),
            "socket.connection.setup.timeout.ms": max(1000, int(settings.connect_timeout_s * 1000)),
            "reconnect.backoff.max.ms": 1000,
            "topic.metadata.propagation.max.ms": int(settings.message_timeout_s * 500),
            "error_cb": self._troubled,
        }
        protocol = "SASL_" if settings.username else ""
        configuration["security.protocol"] = protocol + ("SSL" if settings.tls else "PLAINTEXT")
        if settings.username:
            configuration["sasl.mechanism"] = settings.sasl_mechanism
            configuration["sasl.username"] = settings.username
            configuration["sasl.password"] = plain(settings.password)
        if settings.tls:
            settings.tls_context(
                self._name
            )  # says more clearly than the library what is wrong with the files
            configuration["ssl.endpoint.identification.algorithm"] = "https"
            configuration["ssl.ca.location"] = settings.ca_file or "probe"
            if settings.cert_file:
                configuration["ssl.certificate.location"] = settings.cert_file
                configuration["ssl.key.location"] = settings.key_file or settings.cert_file
        return configuration

    def _troubled(self, error: "KafkaError") -> None:
        self._trouble = _explain(error)

    def _unavailable(self, error: "KafkaError") -> BackendUnavailable:
        return BackendUnavailable(self._said(self._trouble or _explain(error)))

    def _said(self, text: str) -> str:
        text = masked(text, [plain(self._settings.password) or ""])
        return f"backend {self._name}: {','.join(self._settings.brokers)}: {' '.join(text.split())}"


FLUSH_S: Final = 1.0
REQUEST_S: Final = 10.0


def _explain(error: "KafkaError") -> str:
    from confluent_kafka import KafkaError

    if error.code() in {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}:  # noqa: SLF001 -- the library's public names
        return "it does not accept the user name and password: check username, password and sasl_mechanism"
    if error.code() in {KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART}:  # noqa: SLF001
        return "the topic does not exist: create it"
    if error.code() == KafkaError._SSL:  # noqa: SLF001
        return "TLS: no handshake: check ca_file, cert_file and the brokers' names"
    if error.code() in {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE}:  # noqa: SLF001
        return "no broker answers"
    return error.str()


def _silent() -> Any:
    import logging

    logger = logging.getLogger("psk-gateway.kafka")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False  # the library logs every try; what matters comes in errors
    return logger


_SILENT: Final = _silent()
