"""What only one kind of backend can say: access rules, full queues, missing streams, messages that are too large."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import BackendUnavailable
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from tests.support.backends import (
    SUBJECTS,
    AmqpSubject,
    KafkaSubject,
    MqttSubject,
    NatsSubject,
    RedisSubject,
    make_sink,
    message,
)
from tests.support.servers import PASSWORD, USER, Certificates, NatsServer


def begun(kind: str, folder: Path, certificates: Certificates) -> Any:
    subject = SUBJECTS[kind](folder, certificates)
    subject.server.start()
    subject.begin()
    return subject


def deliver(settings: dict[str, Any], *messages: Message) -> Receipt | None:
    async def run() -> Receipt | None:
        sink = make_sink(settings)
        try:
            return await sink.deliver(messages)
        finally:
            await sink.close()

    return asyncio.run(asyncio.wait_for(run(), 20))


class TestMqtt:
    @pytest.fixture
    def mqtt(self, tmp_path: Path, certificates: Certificates) -> Iterator[MqttSubject]:
        subject = begun("mqtt-5", tmp_path, certificates)
        yield subject
        subject.stop()

    def test_access_rules(self, mqtt: MqttSubject) -> None:
        with pytest.raises(BackendUnavailable, match="not authorized, look at the broker's access rules"):
            deliver(mqtt.settings() | {"topic": "denied/{device}"}, message(1))

    def test_nobody_subscribed_is_no_fault(self, mqtt: MqttSubject) -> None:
        assert deliver(mqtt.settings() | {"topic": "lonely/{device}"}, message(1)) is None

    def test_qos_0(self, mqtt: MqttSubject) -> None:
        assert deliver(mqtt.settings() | {"qos": 0}, *[message(each) for each in range(1, 51)]) is None
        assert len(mqtt.arrived(50)) == 50

    def test_separators_are_refused_one_by_one(self, mqtt: MqttSubject) -> None:
        devices = ["a", "b/c", "d", "+", "e"]
        receipt = deliver(mqtt.settings(), *[message(n, device=each) for n, each in enumerate(devices, 1)])
        assert receipt is not None
        assert (sorted(receipt.refused), receipt.settled) == ([1, 3], None)
        assert [each.sequence for each in mqtt.arrived(3)] == [1, 3, 5]


class TestNats:
    @pytest.fixture
    def nats(self, tmp_path: Path, certificates: Certificates) -> Iterator[NatsSubject]:
        subject = begun("nats", tmp_path, certificates)
        yield subject
        subject.stop()

    def test_no_stream(self, nats: NatsSubject) -> None:
        with pytest.raises(BackendUnavailable, match="no JetStream stream takes the subject"):
            deliver(nats.settings() | {"subject": "nowhere.{device}"}, message(1))

    def test_too_large(self, nats: NatsSubject) -> None:
        receipt = deliver(nats.settings(), message(1), message(2, payload=bytes(1 << 20)), message(3))
        assert receipt is not None
        assert "max_payload" in receipt.refused[1]
        assert [each.sequence for each in nats.arrived(2)] == [1, 3]

    def test_sent_twice_arrives_once(self, nats: NatsSubject) -> None:
        for _ in range(2):
            assert deliver(nats.settings(), message(1), message(2)) is None
        assert [each.sequence for each in nats.arrived(2)] == [1, 2]

    def test_core(self, nats: NatsSubject) -> None:
        settings = nats.settings() | {"jetstream": False}
        assert deliver(settings, *[message(each) for each in range(1, 51)]) is None
        assert len(nats.arrived(50)) == 50  # the stream listens, too

    def test_a_full_stream(self, nats: NatsSubject) -> None:
        async def limit(jetstream: Any) -> None:
            from nats.js.api import DiscardPolicy

            await jetstream.update_stream(
                name=nats.place, subjects=[f"{nats.place}.>"], max_msgs=3, discard=DiscardPolicy.NEW
            )

        nats._ask(limit)
        receipt = deliver(nats.settings(), *[message(each) for each in range(1, 6)])
        assert receipt is not None
        assert receipt.settled == 3
        assert "maximum messages exceeded" in str(receipt.error)

    def test_without_jetstream(self, tmp_path: Path, certificates: Certificates) -> None:
        server = NatsServer(tmp_path / "core", certificates)
        command = server.command()
        config = Path(command[-1])
        config.write_text(
            "\n".join(line for line in config.read_text().splitlines() if "jetstream" not in line)
        )
        server.command = lambda: command  # type: ignore[method-assign]  # this one server differs
        with server:
            url = f"nats://127.0.0.1:{server.port}"
            settings = {"kind": "nats", "url": url, "username": USER, "password": PASSWORD, "subject": "up"}
            with pytest.raises(BackendUnavailable):
                deliver(settings, message(1))


class TestAmqp:
    def test_no_queue(self, amqp: AmqpSubject) -> None:
        amqp.begin()
        with pytest.raises(BackendUnavailable, match="no queue takes the message"):
            deliver(amqp.settings() | {"routing_key": "elsewhere"}, message(1))

    def test_no_exchange(self, amqp: AmqpSubject) -> None:
        amqp.begin()
        with pytest.raises(BackendUnavailable, match="no exchange 'nowhere'"):
            deliver(amqp.settings() | {"exchange": "nowhere"}, message(1))

    def test_the_default_exchange(self, amqp: AmqpSubject) -> None:
        amqp.begin()
        assert deliver(amqp.settings() | {"exchange": "", "routing_key": amqp.place}, message(1)) is None
        assert len(amqp.arrived(1)) == 1

    def test_a_full_queue(self, amqp: AmqpSubject) -> None:
        amqp.begin()

        async def bound(channel: Any) -> None:
            await channel.queue_delete(amqp.place)
            arguments = {"x-max-length": 3, "x-overflow": "reject-publish"}
            queue = await channel.declare_queue(amqp.place, durable=True, arguments=arguments)
            await queue.bind(amqp.place, "up.#")

        amqp._ask(bound)
        receipt = deliver(amqp.settings(), *[message(each) for each in range(1, 9)])
        assert receipt is not None
        assert receipt.settled == 3
        assert "a queue is full" in str(receipt.error)
        assert [each.sequence for each in amqp.arrived(3)] == [1, 2, 3]


class TestRedis:
    @pytest.fixture
    def redis(self, tmp_path: Path, certificates: Certificates) -> Iterator[RedisSubject]:
        subject = begun("redis", tmp_path, certificates)
        yield subject
        subject.stop()

    def client(self, redis: RedisSubject) -> Any:
        from redis import Redis

        return Redis(port=redis.server.port, db=3, username=USER, password=PASSWORD)

    def test_streams_are_trimmed(self, redis: RedisSubject) -> None:
        settings = redis.settings() | {"entries_max": 100}
        for start in range(1, 2000, 500):
            assert deliver(settings, *[message(each) for each in range(start, start + 500)]) is None
        arrived = redis.arrived(100)
        assert 100 <= len(arrived) < 300
        assert arrived[-1].sequence == 2000

    def test_a_key_of_another_type(self, redis: RedisSubject) -> None:
        client = self.client(redis)
        client.set(f"{redis.place}:other", "x")
        client.close()
        receipt = deliver(redis.settings(), message(1), message(2, realm="other"), message(3))
        assert receipt is not None
        assert receipt.settled == 1
        assert "WRONGTYPE" in str(receipt.error)

    def test_out_of_memory(self, redis: RedisSubject) -> None:
        client = self.client(redis)
        client.config_set("maxmemory", 1)
        client.close()
        with pytest.raises(BackendUnavailable, match=r"(?i)memory"):
            deliver(redis.settings(), message(1))


class TestKafka:
    @pytest.fixture
    def kafka(self, tmp_path: Path, certificates: Certificates) -> Iterator[KafkaSubject]:
        subject = begun("kafka", tmp_path, certificates)
        yield subject
        subject.server.stop()

    def test_too_large(self, kafka: KafkaSubject) -> None:
        receipt = deliver(kafka.settings(), message(1), message(2, payload=bytes(2_000_000)), message(3))
        assert receipt is not None
        assert list(receipt.refused) == [1]
        assert [each.sequence for each in kafka.arrived(2)] == [1, 3]

    def test_away_and_back(self, kafka: KafkaSubject) -> None:
        """Frozen longer than a message may take; then it goes on, and what was sent again is there, in order."""

        async def run() -> None:
            sink = make_sink(kafka.settings() | {"message_timeout_s": 3})
            assert await sink.deliver([message(1)]) is None
            kafka.server.freeze()
            try:
                with pytest.raises(BackendUnavailable):
                    await sink.deliver([message(2)])
            finally:
                kafka.server.thaw()
            delivered = False
            while not delivered:  # up to the deadline of the test
                with contextlib.suppress(BackendUnavailable):
                    delivered = await sink.deliver([message(2), message(3)]) is None
            await sink.close()

        asyncio.run(asyncio.wait_for(run(), 30))
        assert list(dict.fromkeys(each.sequence for each in kafka.arrived(3))) == [1, 2, 3]
