"""Where payloads go: one file per kind, and the table of those that take messages.

`tcp` is not in the table: a stream route connects to it, and carries bytes and not messages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from gateway.forward.backends.amqp import AmqpBackend
from gateway.forward.backends.file import FileBackend
from gateway.forward.backends.http import HttpBackend
from gateway.forward.backends.kafka import KafkaBackend
from gateway.forward.backends.mqtt import MqttBackend
from gateway.forward.backends.nats import NatsBackend
from gateway.forward.backends.redis import RedisBackend
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt

__all__ = ["SINKS", "MakeSink", "Sink"]


class Sink(Protocol):
    """What takes the messages of one route in one process. One `deliver` at a time."""

    async def open(self) -> None:
        """Get ready. Raises BackendUnavailable; the sink may then still be delivered to, and must be closed."""
        ...

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        """Return when every message is safe, or the Receipt that tells which are.

        Raises BackendUnavailable when nothing is known of any of them; sending them again may then give duplicates.
        Raises BackendRefused when some of them will never be taken and the backend does not tell which; the caller
        then sends smaller batches. May be cancelled at any time, and works again after that.
        """
        ...

    async def close(self) -> None:
        """Let go of everything. Closing twice is allowed."""
        ...


class MakeSink(Protocol):
    """Arguments: the backend's name, its settings, the route's content type, the lock file of stdout."""

    def __call__(self, name: str, settings: Any, content_type: str, stdout_lock: Path, /) -> Sink: ...


SINKS: Final[dict[str, MakeSink]] = {
    "amqp": AmqpBackend,
    "file": FileBackend,
    "http": HttpBackend,
    "kafka": KafkaBackend,
    "mqtt": MqttBackend,
    "nats": NatsBackend,
    "redis": RedisBackend,
}
"""One entry per kind; the settings stand in `gateway.forward.settings.BackendSettings`. Client libraries are imported
when a backend connects, not before.
"""
