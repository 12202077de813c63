"""Backends that answer garbage, half of an answer, nothing, or close in the middle: always BackendUnavailable, in time,
in one line, and the next delivery finds a server that came to its senses.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.errors import BackendUnavailable
from tests.support.backends import make_sink, message

DEADLINE_S = 25
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def closes_at_once(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Nothing is said."""


async def closes_after_a_read(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def garbage(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\xff\x16\x03garbage {[\r\n\r\n" * 50)
    await writer.drain()


async def text(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
    await reader.read(1)


async def says_nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    while await reader.read(65_536):
        pass


def half(greeting: bytes) -> Behaviour:
    """The beginning of what a real server says, and then the end."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        await reader.read(100)

    return behave


KINDS: dict[str, dict[str, Any]] = {
    "http": {"kind": "http", "url": "http://127.0.0.1:PORT/x", "request_timeout_s": 1},
    "mqtt": {"kind": "mqtt", "url": "mqtt://127.0.0.1:PORT", "topic": "up"},
    "nats": {"kind": "nats", "url": "nats://127.0.0.1:PORT", "subject": "up"},
    "amqp": {"kind": "amqp", "url": "amqp://127.0.0.1:PORT", "routing_key": "up"},
    "redis": {"kind": "redis", "url": "redis://127.0.0.1:PORT", "stream": "up"},
    "kafka": {"kind": "kafka", "brokers": ["127.0.0.1:PORT"], "topic": "up", "message_timeout_s": 1},
}
HALVES = {
    "http": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
    "mqtt": b"\x20\x13\x00",
    "nats": b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true,',
    "amqp": b"\x01\x00\x00\x00\x00\x01\xff\x00\x0a\x00\x0a",
    "redis": b"-ERR unknown\r\n*3\r\n$5\r\nhal",
    "kafka": b"\x00\x00\x00\x10\x00\x00",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "behaviour",
    [closes_at_once, closes_after_a_read, garbage, text, says_nothing, None],
    ids=lambda each: each.__name__ if each else "half",
)
def test_a_server_that_is_none(kind: str, behaviour: Behaviour | None) -> None:
    async def test() -> None:
        behave = behaviour or half(HALVES[kind])

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await behave(reader, writer)
            except OSError:
                pass  # it went away first
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        settings = {
            key: value.replace("PORT", str(port)) if isinstance(value, str) else value
            for key, value in KINDS[kind].items()
        } | {"connect_timeout_s": 1}
        if kind == "kafka":
            settings["brokers"] = [f"127.0.0.1:{port}"]
        async with server:
            sink = make_sink(settings)
            for _ in range(2):
                with pytest.raises(BackendUnavailable) as caught:
                    await sink.deliver([message(1)])
                said = str(caught.value)
                assert said.startswith("backend under-test: ")
                assert "\n" not in said
                assert len(said) < 300
            await sink.close()

    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))
