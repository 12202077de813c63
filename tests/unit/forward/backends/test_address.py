"""How a backend that is away is named."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from gateway.errors import BackendUnavailable
from gateway.forward.backends import SINKS
from gateway.forward.backends.tcp import TcpBackend, TcpSettings
from gateway.forward.settings import BackendSettings
from gateway.net.poller import Poller

NOBODY = "[::1]:1"


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "amqp", "url": f"amqp://{NOBODY}", "routing_key": "up"},
        {"kind": "http", "url": f"http://{NOBODY}"},
        {"kind": "mqtt", "url": f"mqtt://{NOBODY}", "topic": "up"},
        {"kind": "nats", "url": f"nats://{NOBODY}", "subject": "up"},
        {"kind": "redis", "url": f"redis://{NOBODY}", "stream": "up"},
    ],
    ids=lambda settings: settings["kind"],
)
def test_an_ipv6_address_stands_in_brackets(settings: dict[str, Any]) -> None:
    async def test() -> None:
        parsed: Any = TypeAdapter[Any](BackendSettings).validate_python(settings)
        sink = SINKS[parsed.kind]("b", parsed, "text/plain", Path("/nonexistent"))
        with pytest.raises(BackendUnavailable, match=r"^backend b: \[::1\]:1: "):
            await sink.open()
        await sink.close()

    asyncio.run(test())


def test_so_does_that_of_a_stream_service() -> None:
    async def test() -> None:
        backend = TcpBackend("b", TcpSettings(kind="tcp", url=f"tcp://{NOBODY}", connect_timeout_s=0.1))
        with pytest.raises(BackendUnavailable, match=r"^no connection to \[::1\]:1: "):
            await backend.connect(Poller(asyncio.get_running_loop()), asyncio.Protocol())

    asyncio.run(test())
