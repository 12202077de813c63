"""Real TCP services in the test process, each on a thread of its own, with the habits that backends have.

A behaviour is a coroutine function that gets one `Peer` per connection. The sockets are raw: what a service does not
read stays in the kernel, so that back-pressure is real.

    with Service(echo) as service:
        ... tcp://127.0.0.1:{service.port} ...
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Self

from tests.support.gateway import wait_for

__all__ = [
    "Peer",
    "Service",
    "closes_at_once",
    "deaf_port",
    "digest_of",
    "echo",
    "ends_first",
    "never_reads",
    "pattern",
    "pours",
    "reads_slowly",
    "replies_at_end",
    "resets",
    "speaks_first",
    "unused_port",
]

READ_BYTES = 64 * 1024
JOIN_S = 10

Behaviour = Callable[["Peer"], Coroutine[Any, Any, None]]


class Peer:
    """One accepted connection. The counters may be read from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._digest = hashlib.sha256()
        self.received_bytes = 0
        self.sent_bytes = 0
        self.ended = False
        """The other side has ended its direction in an orderly way."""
        self.failed = False
        """The connection was reset."""
        self.done = threading.Event()
        """The behaviour is over."""
        self.released = asyncio.Event()

    @property
    def received_digest(self) -> str:
        """SHA-256 of everything that was received."""
        return self._digest.hexdigest()

    async def receive(self, size: int = READ_BYTES) -> bytes:
        """The next bytes, empty at the end."""
        data = await self._loop.sock_recv(self._sock, size)
        self.ended = not data
        self.received_bytes += len(data)
        self._digest.update(data)
        return data

    async def receive_all(self) -> None:
        """Read to the end."""
        while await self.receive():
            pass

    async def send(self, data: bytes) -> None:
        """Send all of it, counting what the kernel has taken."""
        view = memoryview(data)
        while view:
            piece = view[:READ_BYTES]
            await self._loop.sock_sendall(self._sock, piece)
            self.sent_bytes += len(piece)
            view = view[len(piece) :]

    def end(self) -> None:
        """End our direction."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Let the close, which comes at the end of the behaviour, be a reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def serve(self, behaviour: Behaviour) -> None:
        """Run the behaviour on this connection, then close it."""
        try:
            await behaviour(self)
        except OSError:
            self.failed = True
        finally:
            self._sock.close()
            self.done.set()


class Service:
    """A service on 127.0.0.1. It keeps its port over `stop` and `start`."""

    def __init__(
        self, behaviour: Behaviour, *, port: int = 0, receive_buffer_bytes: int = 0, listen: bool = True
    ) -> None:
        self.port = port or unused_port()
        self.peers: list[Peer] = []
        """Every connection since the last start, oldest first."""
        self._behaviour = behaviour
        self._receive_buffer_bytes = receive_buffer_bytes
        self._listen = listen
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def peer(self) -> Peer:
        """The only connection, waiting for it."""
        wait_for(lambda: self.peers, JOIN_S, "a connection to the service")
        (peer,) = self.peers
        return peer

    def start(self) -> None:
        """Listen; returns when it does."""
        listening: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.peers = []
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listening)), name=f"service-{self.port}"
        )
        self._thread.start()
        listening.result(JOIN_S)

    def stop(self) -> None:
        """Close the listener and every connection."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        thread.join(JOIN_S)
        assert not thread.is_alive()

    def release(self) -> None:
        """Let behaviours go on that wait in `Peer.released`."""
        assert self._loop is not None
        for peer in self.peers:
            self._loop.call_soon_threadsafe(peer.released.set)

    def __enter__(self) -> Self:
        if self._listen:
            self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def _serve(self, listening: "concurrent.futures.Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        with self._listener() as listener:
            listening.set_result(None)
            async with asyncio.TaskGroup() as tasks:
                accepting = tasks.create_task(self._accept(listener, tasks))
                await self._stop.wait()
                accepting.cancel()
                for task in self._serving:
                    task.cancel()

    async def _accept(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        self._serving: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(False)
            peer = Peer(sock)
            self.peers.append(peer)
            task = tasks.create_task(peer.serve(self._behaviour))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    def _listener(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
        sock.bind(("127.0.0.1", self.port))
        sock.listen(4096)
        sock.setblocking(False)
        return sock


# Behaviours


async def echo(peer: Peer) -> None:
    """Send back what comes, and the end too."""
    while data := await peer.receive():
        await peer.send(data)
    peer.end()


async def never_reads(peer: Peer) -> None:
    """Hold the connection and read nothing, until it is released: then read everything."""
    await peer.released.wait()
    await peer.receive_all()


def reads_slowly(bytes_per_s: float) -> Behaviour:
    """Read everything, at a bounded rate, and then end."""

    async def behave(peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while await peer.receive():  # noqa: ASYNC110 - it is a rate, and no waiting
            await asyncio.sleep(began + peer.received_bytes / bytes_per_s - loop.time())
        peer.end()

    return behave


async def resets(peer: Peer) -> None:
    """Reset the connection at its first bytes."""
    await peer.receive()
    peer.reset()


async def closes_at_once(peer: Peer) -> None:
    """Take the connection and close it."""


def speaks_first(greeting: bytes) -> Behaviour:
    """Greet, then echo."""

    async def behave(peer: Peer) -> None:
        await peer.send(greeting)
        await echo(peer)

    return behave


def pours(size: int) -> Behaviour:
    """Send `size` bytes of the pattern without being asked, then end."""

    async def behave(peer: Peer) -> None:
        for piece in pattern(size):
            await peer.send(piece)
        peer.end()
        await peer.receive_all()

    return behave


def replies_at_end(size: int) -> Behaviour:
    """Read to the end, and only then send `size` bytes of the pattern."""

    async def behave(peer: Peer) -> None:
        await peer.receive_all()
        for piece in pattern(size):
            await peer.send(piece)

    return behave


def ends_first(greeting: bytes) -> Behaviour:
    """Send a greeting and end, then read to the end."""

    async def behave(peer: Peer) -> None:
        await peer.send(greeting)
        peer.end()
        await peer.receive_all()

    return behave


# Data


@functools.cache
def _block() -> bytes:
    # Of a length that is no multiple of any buffer's, so that a lost or repeated piece shows.
    return random.Random(20260101).randbytes(1_000_003)


def pattern(size: int) -> Iterator[bytes]:
    """`size` bytes, always the same ones, in large pieces."""
    block = _block()
    for _ in range(size // len(block)):
        yield block
    yield block[: size % len(block)]


@functools.cache
def digest_of(size: int) -> str:
    """SHA-256 of `pattern(size)`."""
    digest = hashlib.sha256()
    for piece in pattern(size):
        digest.update(piece)
    return digest.hexdigest()


# Ports


def unused_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port that answers no connection attempt: its accept queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
