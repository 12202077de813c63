"""Backends as the conformance suite sees them: a real server, the settings to reach it, and what arrived there."""

import abc
import asyncio
import contextlib
import json
import secrets
import threading
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from gateway.forward.backends import SINKS, Sink
from gateway.forward.message import Message
from gateway.forward.settings import BackendSettings
from tests.support.servers import (
    PASSWORD,
    USER,
    Certificates,
    HttpServer,
    KafkaMock,
    MosquittoServer,
    NatsServer,
    RabbitServer,
    RedisServer,
    Server,
    wait_until,
)

__all__ = ["CONTENT_TYPE", "LOGIN", "SUBJECTS", "WRONG", "Arrived", "Subject", "make_sink", "message"]

CONTENT_TYPE = "text/plain;charset=utf-8"
LOGIN = f"{USER}:{quote(PASSWORD, safe='')}"
WRONG = "wrong-password-that-must-not-be-logged"
_settings: TypeAdapter[Any] = TypeAdapter(BackendSettings)

T = TypeVar("T")


def message(
    number: int, *, session: str = "s1", device: str = "meter-7", payload: bytes | None = None, **more: Any
) -> Message:
    """A message as a route makes it."""
    body = f"payload {number} äöü".encode() if payload is None else payload
    more = {"realm": "default", "identity": device, "group": "meters", "labels": {"site": "north"}} | more
    return Message(
        device=device, session=session, sequence=number, received_at=1_700_000_000.25, payload=body, **more
    )


def make_sink(settings: dict[str, Any], name: str = "under-test", content_type: str = CONTENT_TYPE) -> Sink:
    """The sink of these settings."""
    parsed = _settings.validate_python(settings)
    return SINKS[parsed.kind](name, parsed, content_type, Path("/nonexistent"))


@dataclass(frozen=True)
class Arrived:
    """One message at the server."""

    id: str
    attributes: dict[str, str]
    payload: bytes

    @property
    def sequence(self) -> int:
        return int(self.attributes["sequence"])


class Subject(abc.ABC):
    """One kind of backend. Each test gets a place of its own (topic, queue, stream) on a server that they share."""

    kind: ClassVar[str]
    can_restart = True
    """Whether the server comes back at the same address."""
    can_freeze = True
    has_login = True
    has_tls = True

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        self.folder = folder
        self.certificates = certificates
        self.place = ""
        self.seen: list[Arrived] = []

    server: Server

    def begin(self) -> None:
        """Before each test."""
        self.place = f"t{secrets.token_hex(6)}"
        self.seen = []
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 -- most servers make places by themselves
        """Make the place."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """For the plain port, with the login in the URL where it has one."""

    def wrong_login(self) -> dict[str, Any]:
        """With a password that the server does not accept."""
        settings = self.settings()
        return settings | {"url": settings["url"].replace(LOGIN, f"{USER}:{WRONG}")}

    def tls_settings(self) -> dict[str, Any]:
        """For the TLS port, with CA and client certificate."""
        raise NotImplementedError

    @abc.abstractmethod
    def fetch(self) -> list[Arrived]:
        """All that is at the place now, in the order of arrival."""

    def arrived(self, count: int) -> list[Arrived]:
        """What arrived since `begin`, once it is so many different ones, over restarts."""
        found: list[Arrived] = []

        def enough() -> bool:
            found[:] = self.fetch()
            return len({each.id for each in found}) >= count

        wait_until(enough, 15, f"{count} messages at {self.kind}, there were {len(found)}")
        return found

    def stop(self) -> None:
        """Stop the server, keeping what arrived."""
        self.server.stop()

    def start(self) -> None:
        """Start it again."""
        self.server.start()


def _by_prefix(headers: dict[str, str], prefix: str) -> dict[str, str]:
    return {key[len(prefix) :]: value for key, value in headers.items() if key.startswith(prefix)}


class FileSubject(Subject):
    kind = "file"
    can_restart = can_freeze = has_login = has_tls = False

    def settings(self) -> dict[str, Any]:
        return {"kind": "file", "path": str(self.folder / self.place)}

    def fetch(self) -> list[Arrived]:
        path = self.folder / self.place
        return [_structured(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def _structured(text: bytes | str) -> Arrived:
    event = json.loads(text)
    return Arrived(event["id"], {key: str(value) for key, value in event.items()}, event["data"].encode())


class HttpSubject(Subject):
    kind = "http"
    mode = "batch"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.server: HttpServer = HttpServer(folder / "http", certificates)

    def settings(self) -> dict[str, Any]:
        url = f"http://{LOGIN}@127.0.0.1:{self.server.port}/events/{self.place}"
        return {"kind": "http", "url": url, "mode": self.mode}

    def tls_settings(self) -> dict[str, Any]:
        url = f"https://{LOGIN}@127.0.0.1:{self.server.tls_port}/events/{self.place}"
        return {"kind": "http", "url": url, "mode": self.mode} | self.certificates.settings

    def fetch(self) -> list[Arrived]:
        return [
            each
            for request in self.server.requests()
            if request["path"].endswith(self.place)
            for each in self._read(request)
        ]

    def _read(self, request: dict[str, Any]) -> list[Arrived]:
        body = request["body"].encode("latin-1")
        return [_structured(json.dumps(event)) for event in json.loads(body)]


class HttpBinarySubject(HttpSubject):
    mode = "binary"

    def _read(self, request: dict[str, Any]) -> list[Arrived]:
        headers = {key.lower(): value for key, value in request["headers"].items()}
        attributes = _by_prefix(headers, "ce-") | {"datacontenttype": headers["content-type"]}
        return [Arrived(attributes["id"], attributes, request["body"].encode("latin-1"))]


class HttpStructuredSubject(HttpSubject):
    mode = "structured"

    def _read(self, request: dict[str, Any]) -> list[Arrived]:
        return [_structured(request["body"].encode("latin-1"))]


class MqttSubject(Subject):
    kind = "mqtt"
    version: Any = 5

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.server = MosquittoServer(folder / "mosquitto", certificates)
        self._reader: Any = None

    def settings(self) -> dict[str, Any]:
        url = f"mqtt://{LOGIN}@127.0.0.1:{self.server.port}"
        return {"kind": "mqtt", "url": url, "topic": f"{self.place}/{{device}}", "version": self.version}

    def tls_settings(self) -> dict[str, Any]:
        url = f"mqtts://{LOGIN}@127.0.0.1:{self.server.tls_port}"
        return self.settings() | {"url": url} | self.certificates.settings

    def prepare(self) -> None:
        self._end_reader()
        self._begin_reader()

    def start(self) -> None:
        super().start()
        self._begin_reader()

    def stop(self) -> None:
        self._end_reader()
        super().stop()

    def _begin_reader(self) -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        subscribed = threading.Event()
        reader = mqtt.Client(CallbackAPIVersion.VERSION2, uuid.uuid4().hex, protocol=mqtt.MQTTv5)
        reader.username_pw_set(USER, PASSWORD)
        reader.on_connect = lambda client, *_: client.subscribe(f"{self.place}/#", 1)
        reader.on_subscribe = lambda *_: subscribed.set()
        reader.on_message = lambda _client, _userdata, got: self.seen.append(self._read(got))
        reader.connect("127.0.0.1", self.server.port)
        reader.loop_start()
        assert subscribed.wait(10)
        self._reader = reader

    def _end_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.disconnect()
            reader.loop_stop()

    def _read(self, got: Any) -> Arrived:
        attributes = dict(got.properties.UserProperty) | {"datacontenttype": got.properties.ContentType}
        return Arrived(attributes["id"], attributes, got.payload)

    def fetch(self) -> list[Arrived]:
        return list(self.seen)


class Mqtt3Subject(MqttSubject):
    version = "3.1.1"

    def _read(self, got: Any) -> Arrived:
        return _structured(got.payload)


class NatsSubject(Subject):
    kind = "nats"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.server = NatsServer(folder / "nats", certificates)
        self.tls_server = NatsServer(folder / "nats-tls", certificates, tls=True)

    def settings(self) -> dict[str, Any]:
        url = f"nats://{LOGIN}@127.0.0.1:{self.server.port}"
        return {"kind": "nats", "url": url, "subject": f"{self.place}.{{device}}"}

    def tls_settings(self) -> dict[str, Any]:
        url = f"tls://{LOGIN}@127.0.0.1:{self.tls_server.port}"
        return self.settings() | {"url": url} | self.certificates.settings

    def prepare(self) -> None:
        self._ask(lambda jetstream: jetstream.add_stream(name=self.place, subjects=[f"{self.place}.>"]))

    def fetch(self) -> list[Arrived]:
        async def read(jetstream: Any) -> list[Arrived]:
            state = (await jetstream.stream_info(self.place)).state
            found = []
            for number in range(1, state.last_seq + 1):
                got = await jetstream.get_msg(self.place, number)
                headers = got.headers or {}
                assert headers["Nats-Msg-Id"] == headers["ce-id"]
                attributes = {key[3:]: value for key, value in headers.items() if key.startswith("ce-")}
                found.append(Arrived(headers["ce-id"], attributes, got.data or b""))
            return found

        return self._ask(read)

    def _ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        import nats

        async def ask() -> T:
            client = await nats.connect(f"nats://127.0.0.1:{self.server.port}", user=USER, password=PASSWORD)
            try:
                return await question(client.jetstream())
            finally:
                await client.close()

        return asyncio.run(ask())


class AmqpSubject(Subject):
    kind = "amqp"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.server = RabbitServer(folder / "rabbitmq", certificates)

    def settings(self) -> dict[str, Any]:
        url = f"amqp://{LOGIN}@127.0.0.1:{self.server.port}"
        return {"kind": "amqp", "url": url, "exchange": self.place, "routing_key": "up.{realm}.{device}"}

    def tls_settings(self) -> dict[str, Any]:
        return (
            self.settings()
            | {"url": f"amqps://{LOGIN}@127.0.0.1:{self.server.tls_port}"}
            | self.certificates.settings
        )

    def prepare(self) -> None:
        async def make(channel: Any) -> None:
            exchange = await channel.declare_exchange(self.place, "topic", durable=True)
            queue = await channel.declare_queue(self.place, durable=True)
            await queue.bind(exchange, "up.#")

        self._ask(make)

    def fetch(self) -> list[Arrived]:
        async def read(channel: Any) -> None:
            queue = await channel.get_queue(self.place)
            while (got := await queue.get(fail=False, no_ack=True)) is not None:
                attributes = _by_prefix(
                    {key: str(value) for key, value in got.headers.items()}, "cloudEvents_"
                )
                assert got.message_id == attributes["id"]
                assert got.delivery_mode == 2
                self.seen.append(
                    Arrived(got.message_id, attributes | {"datacontenttype": got.content_type}, got.body)
                )

        self._ask(read)
        return list(self.seen)

    def _ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        import aio_pika

        async def ask() -> T:
            connection = await aio_pika.connect(
                host="127.0.0.1", port=self.server.port, login=USER, password=PASSWORD
            )
            async with connection:
                return await question(await connection.channel())

        return asyncio.run(ask())


class RedisSubject(Subject):
    kind = "redis"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.server = RedisServer(folder / "redis", certificates)

    def settings(self) -> dict[str, Any]:
        url = f"redis://{LOGIN}@127.0.0.1:{self.server.port}/3"
        return {"kind": "redis", "url": url, "stream": f"{self.place}:{{realm}}"}

    def tls_settings(self) -> dict[str, Any]:
        url = f"rediss://{LOGIN}@127.0.0.1:{self.server.tls_port}/3"
        return self.settings() | {"url": url} | self.certificates.settings

    def fetch(self) -> list[Arrived]:
        import redis

        with contextlib.closing(
            redis.Redis(port=self.server.port, db=3, username=USER, password=PASSWORD)
        ) as client:
            entries: Any = client.xrange(f"{self.place}:default")
        found = []
        for _, fields in entries:
            payload = fields.pop(b"data")
            attributes = {key.decode(): value.decode() for key, value in fields.items()}
            found.append(Arrived(attributes["id"], attributes, payload))
        return found


class KafkaSubject(Subject):
    kind = "kafka"
    has_login = has_tls = False  # librdkafka's mock cluster has neither

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.server: KafkaMock = KafkaMock(folder / "kafka", certificates)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "kafka",
            "brokers": [self.server.address],
            "topic": self.place,
            "message_timeout_s": 5,
        }

    def stop(self) -> None:
        self.server.order("down")

    def start(self) -> None:
        self.server.order("up")

    def fetch(self) -> list[Arrived]:
        from confluent_kafka import Consumer, TopicPartition

        consumer = Consumer(
            {"bootstrap.servers": self.server.address, "group.id": self.place, "enable.partition.eof": True}
        )
        try:
            metadata = consumer.list_topics(self.place, timeout=10)
            partitions = metadata.topics[self.place].partitions
            consumer.assign([TopicPartition(self.place, each, 0) for each in partitions])
            ended, found = 0, []
            while ended < len(partitions):
                got = consumer.poll(5)
                assert got is not None
                if got.error() is not None:
                    ended += 1
                    continue
                received: Any = got.headers() or []
                headers = {key: value.decode() for key, value in received}
                attributes = _by_prefix(headers, "ce_") | {"datacontenttype": headers["content-type"]}
                assert got.key() == attributes["device"].encode()
                found.append(Arrived(attributes["id"], attributes, got.value() or b""))
        finally:
            consumer.close()
        return found


SUBJECTS: dict[str, type[Subject]] = {
    "file": FileSubject,
    "http-batch": HttpSubject,
    "http-binary": HttpBinarySubject,
    "http-structured": HttpStructuredSubject,
    "mqtt-5": MqttSubject,
    "mqtt-3.1.1": Mqtt3Subject,
    "nats": NatsSubject,
    "amqp": AmqpSubject,
    "redis": RedisSubject,
    "kafka": KafkaSubject,
}
