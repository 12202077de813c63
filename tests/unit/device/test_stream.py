"""Bytes over one link, and the link itself, against a TLS-PSK server that follows a script."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gateway.device import DeviceClient, DeviceError, Key, KeyRing
from gateway.device.link import Dialer
from gateway.wire.client_hello import ClientHello
from tests.support.psk_server import Conversation, PskServer, psk_server

RunAsync = Callable[[Coroutine[Any, Any, None]], None]
KEY = Key(bytes(range(32)))


def server(script: Callable[[Conversation, bytes], None]) -> PskServer:
    return PskServer({"meter-7": KEY.reveal()}, script)


def echo(conversation: Conversation, data: bytes) -> None:
    conversation.send(data)


async def connect(peer: PskServer) -> DeviceClient:
    return await DeviceClient.connect("127.0.0.1", peer.port, "meter-7", KEY)


def test_bytes_there_and_back_and_an_end_on_each_side(run_async: RunAsync) -> None:
    async def scenario() -> None:
        async with psk_server(server(echo)) as peer:
            client = await connect(peer)
            assert (client.version, client.hint, client.identity) == ("TLSv1.3", None, "meter-7")
            data = bytes(range(256)) * 10_000

            async def send() -> None:
                for start in range(0, len(data), 10_000):
                    await client.send(data[start : start + 10_000])
                await client.finish()

            sending = asyncio.get_running_loop().create_task(send())
            received = b""
            while piece := await client.receive():
                received += piece
                await asyncio.sleep(0.001)  # slower than it comes: what waits is bounded
            await sending
            assert received == data
            with pytest.raises(DeviceError, match="has closed the connection"):
                await client.send(b"late")
            await client.close()

    run_async(scenario())


def test_who_does_not_receive_stops_the_server(run_async: RunAsync) -> None:
    def flood(conversation: Conversation, _data: bytes) -> None:
        for _ in range(400):
            conversation.send(bytes(100_000))

    async def scenario() -> None:
        async with psk_server(server(flood)) as peer:
            client = await connect(peer)
            await client.send(b"x")
            await asyncio.sleep(0.3)
            assert client._received_bytes < 2_000_000
            total = 0
            while total < 40_000_000:
                total += len(await client.receive())
            await client.close()

    run_async(scenario())


def test_a_cut_is_an_error_for_all_who_wait(run_async: RunAsync) -> None:
    async def scenario() -> None:
        async with psk_server(server(lambda conversation, _data: conversation.transport.abort())) as peer:
            client = await connect(peer)
            await client.send(b"x")
            with pytest.raises(DeviceError, match=r"cut the connection|broke"):
                await client.receive()
            with pytest.raises(DeviceError):
                await client.send(b"x")
            await client.close()

    run_async(scenario())


def test_a_name_goes_into_sni(run_async: RunAsync) -> None:
    names: list[str | None] = []

    class Named(Conversation):
        def contexts_for(self, hello: ClientHello) -> Any:
            names.append(hello.server_name)
            return super().contexts_for(hello)

    async def scenario() -> None:
        peer = server(echo)
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: Named(peer), "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        ring = KeyRing.of("meter-7", KEY)
        for name in ("north.example", None):
            client = await DeviceClient.dial(Dialer("127.0.0.1", port, ring, name))
            await client.close()
        listening.close()
        await asyncio.sleep(0.01)

    run_async(scenario())
    assert names == ["north.example", None]


def test_giving_up_leaves_nothing_open(run_async: RunAsync) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            connecting = asyncio.get_running_loop().create_task(
                DeviceClient.connect("127.0.0.1", port, "meter-7", KEY)
            )
            connection, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
            await asyncio.sleep(0.05)
            connecting.cancel()
            await asyncio.wait({connecting})
            assert connecting.cancelled()
            connection.settimeout(5)
            with connection:
                while await asyncio.get_running_loop().run_in_executor(None, _receive, connection):
                    pass  # the hello, then the end

    run_async(scenario())


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""
