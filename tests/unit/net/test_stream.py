"""Streams on a poller, on real sockets: what a protocol hears of, and that nothing is lost or kept without bound."""

import asyncio
import errno
import random
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from gateway.net.acceptor import Acceptor
from gateway.net.connector import Attempts, Connecting
from gateway.net.poller import Poller
from gateway.net.stream import READ_BYTES, SEND_LAST, Stream

Body = Callable[["Stage"], Coroutine[Any, Any, None]]


class Recorder(asyncio.Protocol):
    """Keeps what it hears; `on_data` may act on it."""

    def __init__(self) -> None:
        self.stream: Stream
        self.received = bytearray()
        self.heard: list[str] = []
        self.on_data: Callable[[], None] = lambda: None
        self.keeps_open = True
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, Stream)
        self.stream = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.on_data()

    def eof_received(self) -> bool:
        self.heard.append("eof")
        return self.keeps_open

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


class Stage:
    """A poller with an acceptor, and the peers that connect to it."""

    def __init__(self) -> None:
        self.poller = Poller(asyncio.get_running_loop())
        self.accepted: list[Recorder] = []
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.address = listening.getsockname()
        self.acceptor = Acceptor(self.poller, listening, 16, self._protocol)

    def _protocol(self) -> Recorder:
        self.accepted.append(Recorder())
        return self.accepted[-1]

    async def connect(self) -> tuple[socket.socket, Recorder]:
        """A blocking socket, and the protocol at the other end."""
        peer = socket.create_connection(self.address, timeout=5)
        count = len(self.accepted)
        await until(lambda: len(self.accepted) > count)
        return peer, self.accepted[-1]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what the kernel does sets no event
            await asyncio.sleep(0.001)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Callable[[Body], None]:
    """Runs a test on a stage, on either event loop."""

    def run(body: Body) -> None:
        async def staged() -> None:
            stage = Stage()
            await body(stage)
            stage.acceptor.close()
            stage.poller.close()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(staged())

    return run


Play = Callable[[Body], None]


def test_more_than_one_read_and_the_end_behind_it_are_read(play: Play) -> None:
    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        data = random.randbytes(3 * READ_BYTES)
        await asyncio.to_thread(peer.sendall, data)
        peer.close()
        await until(lambda: protocol.heard)
        assert protocol.received == data
        assert protocol.heard == ["eof"]
        assert protocol.stream.host == "127.0.0.1"
        protocol.stream.close()
        assert await protocol.lost is None

    play(body)


def test_nothing_is_read_while_paused_and_everything_after(play: Play) -> None:
    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        protocol.on_data = protocol.stream.pause_reading
        size = READ_BYTES + 5000
        await asyncio.to_thread(peer.sendall, bytes(size))
        peer.close()
        await until(lambda: protocol.received)
        await asyncio.sleep(0.05)  # an unread rest is no event: there is none to wait for
        assert len(protocol.received) <= READ_BYTES
        protocol.on_data = lambda: None
        protocol.stream.resume_reading()
        await until(lambda: protocol.heard)
        assert len(protocol.received) == size
        protocol.stream.abort()
        await protocol.lost

    play(body)


def test_a_slow_reader_gets_everything_and_is_waited_for(play: Play) -> None:
    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        stream = protocol.stream
        data = bytes(range(256)) * 64
        sent = 0
        while "pause" not in protocol.heard:
            stream.write(data)
            sent += len(data)
        assert stream.get_write_buffer_size() <= 64 * 1024 + len(data)
        stream.close()
        received = bytearray()
        while piece := await asyncio.to_thread(peer.recv, 65536):
            received += piece
        assert received == data * (sent // len(data))
        assert await protocol.lost is None
        assert protocol.heard == ["pause", "resume"]
        peer.close()

    play(body)


def test_what_is_lent_may_change_after_the_call(play: Play) -> None:
    """Also what the kernel did not take at once."""

    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        lent = bytearray(8 << 20)
        for value in (1, 2):
            lent[:] = bytes([value]) * len(lent)
            protocol.stream.write(memoryview(lent))
        assert protocol.stream.get_write_buffer_size() > len(lent)
        lent[:] = bytes(len(lent))
        received = await asyncio.to_thread(receive, peer, 2 * len(lent))
        assert received == b"\1" * len(lent) + b"\2" * len(lent)
        protocol.stream.abort()
        await protocol.lost
        peer.close()

    play(body)


def receive(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := peer.recv(1 << 20)):
        data += piece
    return bytes(data)


def test_the_last_words_come_before_the_end(play: Play) -> None:
    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        protocol.stream.write(b"bye", SEND_LAST)
        protocol.stream.write_eof()
        assert await asyncio.to_thread(peer.recv, 10) == b"bye"
        assert await asyncio.to_thread(peer.recv, 10) == b""
        peer.sendall(b"still heard")
        await until(lambda: protocol.received == b"still heard")
        protocol.stream.write(b"never said", SEND_LAST)
        protocol.stream.close()
        await protocol.lost
        peer.close()

    play(body)


def test_a_reset_is_told(play: Play) -> None:
    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()
        assert isinstance(await asyncio.wait_for(protocol.lost, 5), ConnectionResetError)

    play(body)


def test_a_protocol_that_fails_loses_its_connection_alone(play: Play) -> None:
    async def body(stage: Stage) -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        (bad_peer, bad), (good_peer, good) = await stage.connect(), await stage.connect()

        def fail() -> None:
            raise ValueError("a bug")

        bad.on_data = fail
        bad_peer.sendall(b"x")
        good_peer.sendall(b"y")
        assert isinstance(await asyncio.wait_for(bad.lost, 5), ValueError)
        await until(lambda: good.received == b"y")
        assert [str(each["exception"]) for each in complaints] == ["a bug"]
        bad_peer.close()
        good_peer.close()
        await until(lambda: "eof" in good.heard)
        good.stream.close()
        await good.lost

    play(body)


def test_no_end_is_told_from_within_a_call(play: Play) -> None:
    async def body(stage: Stage) -> None:
        peer, protocol = await stage.connect()
        protocol.stream.abort()
        assert not protocol.lost.done()
        protocol.stream.write(b"ignored")
        await protocol.lost
        assert await asyncio.to_thread(peer.recv, 10) == b""
        peer.close()

    play(body)


@pytest.fixture
def service() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)
        yield listening


def outcomes(found: list[OSError | None]) -> Callable[[Connecting, OSError | None], None]:
    return lambda _, error: found.append(error)


def test_what_a_service_says_at_once_is_heard(play: Play, service: socket.socket) -> None:
    async def body(stage: Stage) -> None:
        found: list[OSError | None] = []
        protocol = Recorder()
        address = service.getsockname()
        Connecting(stage.poller, socket.AF_INET, address, protocol, outcomes(found), first=b"who")
        accepted, _ = service.accept()
        accepted.sendall(b"hello")
        accepted.shutdown(socket.SHUT_WR)
        await until(lambda: protocol.heard)
        assert (found, bytes(protocol.received), protocol.heard) == ([None], b"hello", ["eof"])
        protocol.stream.write(b" is there")
        protocol.stream.close()
        assert await protocol.lost is None
        said = bytearray()
        while piece := accepted.recv(100):
            said += piece
        assert said == b"who is there"
        accepted.close()

    play(body)


def test_a_service_that_is_away_is_told(play: Play, service: socket.socket) -> None:
    async def body(stage: Stage) -> None:
        found: list[OSError | None] = []
        address = service.getsockname()
        service.close()
        Connecting(stage.poller, socket.AF_INET, address, Recorder(), outcomes(found))
        await until(lambda: found)
        assert isinstance(found[0], OSError)
        assert found[0].errno == errno.ECONNREFUSED

    play(body)


def test_an_attempt_that_takes_too_long_is_given_up(play: Play) -> None:
    async def body(stage: Stage) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            address = (int(socket.AF_INET), full.getsockname())
            fillers = [socket.create_connection(full.getsockname(), timeout=5)]
            found: list[OSError | None] = []
            attempts = Attempts(0.2)
            for _ in range(3):  # some still find room in the backlog; the last one cannot
                attempts.begin(stage.poller, address, Recorder(), found.append)
            cancelled = attempts.begin(stage.poller, address, Recorder(), found.append)
            assert cancelled is not None
            cancelled.cancel()
            await until(lambda: any(error is not None for error in found))
            assert {error.errno for error in found if error is not None} == {errno.ETIMEDOUT}
            assert len(found) <= 3
            for each in fillers:
                each.close()

    play(body)
