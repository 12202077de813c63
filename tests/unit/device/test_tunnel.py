"""A tunnel between plain clients and a TLS-PSK server that follows a script."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from gateway.device import DeviceError, Key, KeyRing
from gateway.device.link import Dialer
from gateway.device.tunnel import Tunnel, TunnelSettings
from tests.support.psk_server import Conversation, PskServer, psk_server

RunAsync = Callable[[Coroutine[Any, Any, None]], None]
KEY = Key(bytes(range(32)))
RING = KeyRing.of("meter-7", KEY)


def server(script: Callable[[Conversation, bytes], None]) -> PskServer:
    return PskServer({"meter-7": KEY.reveal()}, script)


def echo(conversation: Conversation, data: bytes) -> None:
    conversation.send(data)


def ignore(_conversation: Conversation, _data: bytes) -> None:
    pass


@contextlib.asynccontextmanager
async def tunnelled(
    port: int, *, ring: KeyRing = RING, settings: TunnelSettings | None = None
) -> AsyncIterator[tuple[Tunnel, int]]:
    tunnel = Tunnel(Dialer("127.0.0.1", port, ring), settings)
    _, listening = await tunnel.open("127.0.0.1", 0)
    try:
        yield tunnel, listening
    finally:
        await tunnel.close()
        assert not tunnel.connections


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition, not an event
            await asyncio.sleep(0.005)


def test_many_clients_at_once_full_duplex(run_async: RunAsync) -> None:
    async def converse(port: int, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = bytes([number]) * 300_000
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        await closed(writer)

    async def scenario() -> None:
        async with psk_server(server(echo)) as peer, tunnelled(peer.port) as (tunnel, port):
            await asyncio.gather(*(converse(port, number) for number in range(50)))
            await until(lambda: not tunnel.connections)
            await until(lambda: not peer.live)
            assert len(peer.conversations) == 50
            assert all(conversation.finished for conversation in peer.conversations)

    run_async(scenario())


def test_each_direction_ends_on_its_own(run_async: RunAsync) -> None:
    """The client ends first, then the server says the rest; and the other way round."""

    async def scenario() -> None:
        peer = server(ignore)
        async with psk_server(peer), tunnelled(peer.port) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await until(lambda: peer.live and peer.live[0].session.is_open)
            first = peer.live[0]
            first.send(b"hello")
            first.session.close()  # close_notify, no FIN
            first.flush()
            assert await reader.read() == b"hello"
            writer.write(b"and the rest")
            writer.write_eof()
            await until(lambda: first.finished)
            assert first.received == b"and the rest"
            await until(lambda: not first.live)
            await closed(writer)

    run_async(scenario())


def test_a_cut_is_never_an_orderly_end(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(lambda conversation, _data: conversation.transport.abort())
        async with psk_server(peer), tunnelled(peer.port) as (tunnel, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await until(lambda: not tunnel.connections)
            await closed(writer)

    run_async(scenario())


def test_a_client_that_is_cut_cuts_its_link(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(ignore)
        async with psk_server(peer), tunnelled(peer.port) as (_, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            await until(lambda: peer.live)
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0"
            )
            writer.transport.abort()
            await until(lambda: not peer.live)
            assert not peer.conversations[0].finished

    run_async(scenario())


def test_a_server_that_does_not_read_stops_the_client(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(ignore)
        async with psk_server(peer), tunnelled(peer.port) as (tunnel, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            await until(lambda: peer.live)
            peer.live[0].transport.pause_reading()
            writer.transport.set_write_buffer_limits(high=0)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    writer.write(bytes(100_000))
                    sent += 100_000
                    async with asyncio.timeout(0.3):
                        await writer.drain()
            assert sent < 40_000_000  # what the kernel's buffers hold
            (connection,) = tunnel.connections
            assert connection._link is not None
            assert connection._link.waiting_bytes < 1_000_000
            peer.live[0].transport.resume_reading()
            await writer.drain()
            await closed(writer)
            await until(lambda: len(peer.conversations[0].received) == sent)

    run_async(scenario())


def test_a_client_that_does_not_read_stops_the_server(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(ignore)
        async with psk_server(peer), tunnelled(peer.port) as (tunnel, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
            await until(lambda: peer.live and peer.live[0].session.is_open)
            sent = 0
            while peer.live[0].transport.get_write_buffer_size() < 1_000_000:
                peer.live[0].send(bytes(100_000))
                sent += 100_000
                await asyncio.sleep(0)
            (connection,) = tunnel.connections
            assert connection._plain is not None
            assert connection._plain.get_write_buffer_size() < 1_000_000
            assert len(await reader.readexactly(sent)) == sent
            await closed(writer)

    run_async(scenario())


def test_a_client_waits_for_a_gateway_that_comes_back(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(echo)
        async with psk_server(peer):
            port = peer.port
        async with tunnelled(port, settings=TunnelSettings(patience_s=10)) as (_, listening):
            reader, writer = await asyncio.open_connection("127.0.0.1", listening)
            writer.write(b"early")
            await asyncio.sleep(0.3)
            async with psk_server(peer, port):
                assert await reader.readexactly(5) == b"early"
                await closed(writer)

    run_async(scenario())


@pytest.mark.parametrize("why", ["away", "wrong key"])
def test_a_client_without_a_link_is_cut(run_async: RunAsync, why: str) -> None:
    async def scenario() -> None:
        peer = server(echo)
        wrong = KeyRing.of("meter-7", Key(bytes(16)))
        async with psk_server(peer):
            port = peer.port if why == "wrong key" else 9
            async with tunnelled(port, ring=wrong, settings=TunnelSettings(patience_s=0.2)) as (
                tunnel,
                listening,
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", listening)
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                await until(lambda: not tunnel.connections)
                await closed(writer)

    run_async(scenario())


def test_more_clients_than_allowed_are_turned_away(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(echo)
        settings = TunnelSettings(connections_max=1)
        async with psk_server(peer), tunnelled(peer.port, settings=settings) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            other, other_writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionResetError):
                assert await other.read() == b""
            await closed(writer)
            await closed(other_writer)

    run_async(scenario())


def test_the_end_of_the_tunnel_is_an_orderly_one(run_async: RunAsync) -> None:
    async def scenario() -> None:
        peer = server(echo)
        async with psk_server(peer):
            async with tunnelled(peer.port) as (_, port):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"x")
                await reader.readexactly(1)
            assert await reader.read() == b""
            await until(lambda: peer.conversations[0].finished)
            await closed(writer)

    run_async(scenario())


def test_a_port_in_use_says_so(run_async: RunAsync) -> None:
    async def scenario() -> None:
        async with tunnelled(9) as (_, port):
            with pytest.raises(
                DeviceError, match=rf"cannot listen on 127\.0\.0\.1:{port}: address already in use"
            ):
                await Tunnel(Dialer("127.0.0.1", 9, RING)).open("127.0.0.1", port)

    run_async(scenario())
