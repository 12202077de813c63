"""Brokers that go away, and that refuse for a while, each in the way that its kind can, and lose nothing that they have confirmed."""

import abc
import signal
import subprocess
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
from tests.support.servers import PASSWORD, USER, Certificates, MosquittoServer, program, wait_until

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


READER = "reader"


class _ReaderFirst(MosquittoServer):
    """Mosquitto that, started again, lets the gateway in only after its reader: a session does not outlive this broker
    (version 2.0.11 with persistence forgets those of MQTT 5), and what comes while nobody has subscribed is dropped.
    """

    may_publish = True

    def command(self) -> list[str]:
        command = super().command()
        self._write_access()
        self._add_reader()
        with (self.folder / "mosquitto.conf").open("a") as config:
            config.write("max_inflight_messages 0\n")  # so that what is confirmed has been passed on
        self._everyone = self._passwords.read_text()
        self._passwords.write_text(self._everyone.splitlines()[-1] + "\n")
        return command

    def let_all_in(self) -> None:
        """The reader has subscribed."""
        self._passwords.write_text(self._everyone)
        self._reload()

    def allow(self, *, publish: bool) -> None:
        """Change who may publish, for clients that are connected too."""
        self.may_publish = publish
        self._write_access()
        self._reload()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(20)
        super().stop()

    @property
    def _passwords(self) -> Path:
        return self.folder / "passwords"

    def _add_reader(self) -> None:
        tool = program("mosquitto_passwd")
        subprocess.run([tool, "-b", self._passwords, READER, PASSWORD], check=True, capture_output=True)

    def _reload(self) -> None:
        assert self._process is not None
        reloads = self._reloads()
        self._process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._reloads() > reloads, 10, "the reload")

    def _reloads(self) -> int:
        return self.log_path.read_text().count("Reloading config")

    def _write_access(self) -> None:
        rights = "readwrite" if self.may_publish else "read"
        (self.folder / "acl").write_text(f"pattern {rights} #\n")


class _ConnectedReader:
    """A subscriber that connects again by itself."""

    def _begin_reader(self: Any) -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        if self._reader is None:
            self._subscribed = threading.Event()
            reader = mqtt.Client(CallbackAPIVersion.VERSION2, f"reader-{self.place}", protocol=mqtt.MQTTv5)
            reader.username_pw_set(READER, PASSWORD)
            reader.reconnect_delay_set(1, 1)
            reader.on_connect = lambda client, *_: client.subscribe(f"{self.place}/#", 0)  # nothing to write
            reader.on_subscribe = lambda *_: self._subscribed.set()
            reader.on_message = lambda _client, _userdata, got: self.seen.append(self._read(got))
            reader.connect("127.0.0.1", self.server.port)
            reader.loop_start()
            self._reader = reader
        assert self._subscribed.wait(10)
        self.server.let_all_in()

    def stop(self: Any) -> None:
        self._subscribed.clear()
        self.server.stop()


class _Mqtt5(_ConnectedReader, MqttSubject):
    pass


class _Mqtt3(_ConnectedReader, Mqtt3Subject):
    pass


class MqttTrouble(Trouble):
    how_stopped = "ended by SIGTERM"
    how_refusing = "access rules reloaded: PUBACK with 0x87"
    subject_type: type[MqttSubject] = _Mqtt5

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, certificates)
        self.subject = self.subject_type(folder, certificates)
        self._server = _ReaderFirst(folder / "mosquitto", certificates)
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
