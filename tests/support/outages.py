"""Brokers that go away, and that refuse for a while, each in the way that its kind can; what they confirmed they keep."""

import abc
import signal
import threading
from pathlib import Path
from typing import Any

from tests.support.backends import (
    AmqpSubject,
    Arrived,
    KafkaSubject,
    Mqtt3Subject,
    MqttSubject,
    NatsSubject,
    RedisSubject,
    Subject,
)
from tests.support.servers import PASSWORD, USER, Certificates, MosquittoServer, wait_until

__all__ = ["TROUBLES", "Trouble"]


class Trouble(abc.ABC):
    """What can be done to one broker. `subject` reads what arrived; `stop` and `start` are its own."""

    subject: Subject
    how_stopped = "killed"
    how_refusing = ""
    """empty: it has no way to refuse for a while"""

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        self.folder = folder
        self.certificates = certificates

    def stop(self) -> None:
        """Take it away."""
        self.subject.stop()

    def start(self) -> None:
        """It is back, with everything that it confirmed."""
        self.subject.start()

    def refuse(self) -> None:
        """From now on it answers, and takes nothing."""
        raise NotImplementedError

    def accept(self) -> None:
        """It takes again."""
        raise NotImplementedError

    def fetch(self) -> list[Arrived]:
        """All that arrived, in order within a session."""
        return self.subject.fetch()


class _LastingMosquitto(MosquittoServer):
    """Mosquitto that writes what it holds to its disk when it ends, which it does by SIGTERM: a killed one loses what it
    has confirmed.
    """

    may_publish = True

    def command(self) -> list[str]:
        command = super().command()
        with (self.folder / "mosquitto.conf").open("a") as config:
            config.write(f"persistence true\npersistence_location {self.folder}/\n")
        self._write_access()
        return command

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(20)
        super().stop()

    def allow(self, *, publish: bool) -> None:
        """Change who may publish, for clients that are connected too."""
        self.may_publish = publish
        self._write_access()
        assert self._process is not None
        reloads = self._reloads()
        self._process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._reloads() > reloads, 10, "the reload")

    def _reloads(self) -> int:
        return self.log_path.read_text().count("Reloading config")

    def _write_access(self) -> None:
        # A rule of a user is not found for a session without its client, and what comes for it would be dropped.
        rights = "readwrite" if self.may_publish else "read"
        (self.folder / "acl").write_text(f"pattern {rights} #\n")


class _LastingReader:
    """A subscriber whose session at the broker outlives both ends of the connection."""

    _reader: Any = None
    seen: list[Arrived]

    def _begin_reader(self: Any) -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        if self._reader is not None:
            return  # it connects again by itself
        subscribed = threading.Event()
        reader = mqtt.Client(CallbackAPIVersion.VERSION2, f"reader-{self.place}", protocol=mqtt.MQTTv5)
        reader.username_pw_set(USER, PASSWORD)
        reader.reconnect_delay_set(1, 1)
        reader.on_connect = lambda client, *_: client.subscribe(f"{self.place}/#", 1)
        reader.on_subscribe = lambda *_: subscribed.set()
        reader.on_message = lambda _client, _userdata, got: self.seen.append(self._read(got))
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        properties.SessionExpiryInterval = 3600
        reader.connect("127.0.0.1", self.server.port, properties=properties)
        reader.loop_start()
        assert subscribed.wait(10)
        self._reader = reader

    def stop(self: Any) -> None:
        self.server.stop()


class _Mqtt5(_LastingReader, MqttSubject):
    pass


class _Mqtt3(_LastingReader, Mqtt3Subject):
    pass


class MqttTrouble(Trouble):
    how_stopped = "ended by SIGTERM"
    how_refusing = "access rules reloaded: PUBACK with 0x87"
    subject_type: type[MqttSubject] = _Mqtt5

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.subject = self.subject_type(folder, certificates)
        self._server = _LastingMosquitto(folder / "mosquitto", certificates)
        self.subject.server = self._server

    def refuse(self) -> None:
        self._server.allow(publish=False)

    def accept(self) -> None:
        self._server.allow(publish=True)


class Mqtt3Trouble(MqttTrouble):
    """A PUBACK of MQTT 3.1.1 cannot refuse."""

    how_refusing = ""
    subject_type = _Mqtt3


class NatsTrouble(Trouble):
    how_refusing = "stream at its max_msgs, which discards what is new"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.subject: NatsSubject = NatsSubject(folder, certificates)

    def refuse(self) -> None:
        self._limit(1)

    def accept(self) -> None:
        self._limit(-1)

    def _limit(self, messages: int) -> None:
        from nats.js.api import DiscardPolicy, StreamConfig

        place = self.subject.place

        async def limit(jetstream: Any) -> None:
            # Lowered, a limit would remove what is there: so it is the number of what is there.
            now = (await jetstream.stream_info(place)).state.messages
            await jetstream.update_stream(
                StreamConfig(
                    name=place,
                    subjects=[f"{place}.>"],
                    discard=DiscardPolicy.NEW,
                    max_msgs=messages if messages < 0 else now + 100,
                )
            )

        self.subject._ask(limit)


class AmqpTrouble(Trouble):
    """A queue with a length and `reject-publish`. To take again there is another queue: what is in the full one stays."""

    how_refusing = "queue at its x-max-length, reject-publish: basic.nack"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.subject: AmqpSubject = AmqpSubject(folder, certificates)
        self._full: list[str] = []

    def refuse(self) -> None:
        name = f"{self.subject.place}-full-{len(self._full)}"
        self._full.append(name)

        async def narrow(channel: Any) -> None:
            # A copy goes to a queue that is full soon: what is refused by one of the queues is refused.
            queue = await channel.declare_queue(
                name, durable=True, arguments={"x-max-length": 100, "x-overflow": "reject-publish"}
            )
            await queue.bind(self.subject.place, "up.#")
            wide = await channel.get_queue(self.subject.place)
            await wide.unbind(self.subject.place, "up.#")

        self.subject._ask(narrow)

    def accept(self) -> None:
        name = self._full[-1]

        async def widen(channel: Any) -> None:
            wide = await channel.get_queue(self.subject.place)
            await wide.bind(self.subject.place, "up.#")
            queue = await channel.get_queue(name)
            await queue.unbind(self.subject.place, "up.#")

        self._read(self.subject.place)
        self.subject._ask(widen)
        self._read(name)

    def fetch(self) -> list[Arrived]:
        self._read(self.subject.place)
        return list(self.subject.seen)

    def _read(self, queue: str) -> None:
        place, self.subject.place = self.subject.place, queue
        try:
            self.subject.fetch()
        finally:
            self.subject.place = place


class RedisTrouble(Trouble):
    how_refusing = "at its maxmemory, noeviction: OOM"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.subject: RedisSubject = RedisSubject(folder, certificates)

    def refuse(self) -> None:
        self._limit(1)

    def accept(self) -> None:
        self._limit(0)

    def _limit(self, size: int) -> None:
        import redis

        with redis.Redis(port=self.subject.server.port, username=USER, password=PASSWORD) as client:
            client.config_set("maxmemory", size)


class KafkaTrouble(Trouble):
    how_stopped = "taken down: connections cut, new ones refused"
    how_refusing = "produce requests answered with TOPIC_AUTHORIZATION_FAILED"

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.subject: KafkaSubject = KafkaSubject(folder, certificates)

    def refuse(self) -> None:
        self.subject.server.order("refuse")

    def accept(self) -> None:
        self.subject.server.order("accept")


TROUBLES: dict[str, type[Trouble]] = {
    "mqtt-5": MqttTrouble,
    "mqtt-3.1.1": Mqtt3Trouble,
    "nats": NatsTrouble,
    "amqp": AmqpTrouble,
    "redis": RedisTrouble,
    "kafka": KafkaTrouble,
}
