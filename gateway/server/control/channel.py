"""The control channel: between the supervisor and its children, and between gatewayctl and the supervisor.

A channel is a Unix stream of frames: a 4-byte length (big-endian) and a msgpack envelope. Either end may `notify`
(no answer), or `call` (exactly one answer, or the caller's deadline passes). The messages are those of `messages.py`.
The peer is always this program, or root, or the user that owns the socket (0600); a frame that does not parse ends the
channel all the same. The supervisor's end can be handed to another image of the program: see `detach`.
"""

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

import msgspec

from gateway.errors import ControlError
from gateway.server.control.messages import Done, Message

__all__ = [
    "CONTROL_SOCKET",
    "Answer",
    "Channel",
    "DetachedChannel",
    "Handler",
    "connect_unix",
    "serve_unix",
    "unix_listener",
]

CONTROL_SOCKET: Final = "control.sock"
"""In `node.data_dir`: where a running gateway listens to operators."""
_CREDENTIALS: Final = struct.Struct("3i")
"""Of a peer: process, user and group."""
_FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""A list of 100,000 sessions is some 20 MB."""
_SIZE_BYTES: Final = 4
_READ_BYTES: Final = 256 * 1024
_FLUSH_S: Final = 1.0
"""How long a peer may take to read what was said to it, before its channel is handed over."""


class _Envelope(msgspec.Struct, array_like=True):
    kind: Literal[0, 1, 2, 3]
    number: int
    body: Message | str


_NOTIFY: Final = 0
_CALL: Final = 1
_ANSWER: Final = 2
_FAILURE: Final = 3

Answer = Message | asyncio.Task[Message] | None
"""To a message. None is `Done`; a task gives it later, so that what comes behind a message that takes long does not wait."""
Handler = Callable[[Message], Awaitable[Answer]]


class DetachedChannel(NamedTuple):
    """A channel between two images of a program: what `Channel.over` needs to go on where the other stopped."""

    descriptor: int
    rest: bytes
    """the beginning of a frame that has not arrived in full"""
    next_number: int


class Channel:
    """One end of a control channel. `serve` runs it until the other end closes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.handler = handler
        self._rest = bytearray()
        self._next_number = 1
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Envelope)
        self._is_detaching = False
        self.ended = asyncio.Event()
        """Set when `serve` is over."""

    @classmethod
    async def over(cls, sock: socket.socket, handler: Handler | None = None) -> Self:
        """A channel on a connected stream socket, which it owns from now on."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_FRAME_BYTES_MAX)
        return cls(reader, writer, handler)

    @classmethod
    async def attach(cls, detached: DetachedChannel, handler: Handler | None = None) -> Self:
        """A channel that goes on where `detach` has stopped."""
        channel = await cls.over(socket.socket(fileno=detached.descriptor), handler)
        channel._rest += detached.rest  # noqa: SLF001 - our own
        channel._next_number = detached.next_number  # noqa: SLF001 - our own
        return channel

    async def detach(self) -> DetachedChannel:
        """Let `serve` return with nothing lost, and give the socket away; it stays open.

        Whole frames that have arrived are handled, calls that wait fail. Raises ControlError when the peer does not read
        what was said to it.
        """
        self._is_detaching = True
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a transport of a socket
        self._reader.feed_eof()
        await self.ended.wait()
        self._writer.transport.set_write_buffer_limits(0)
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self._writer.drain()
        except (TimeoutError, ConnectionError):
            self._writer.transport.abort()
            raise ControlError("it does not read what is said to it") from None
        descriptor = os.dup(self._writer.get_extra_info("socket").fileno())
        self._writer.transport.abort()
        return DetachedChannel(descriptor, bytes(self._rest), self._next_number)

    async def receive_first(self) -> Message | None:
        """The first message, before `serve`: a child is configured by it. None when the other end closed."""
        envelope = await self._receive()
        return None if envelope is None or isinstance(envelope.body, str) else envelope.body

    async def finish(self) -> None:
        """Close this end when everything that was sent has left this process, or the other end is gone."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def serve(self) -> None:
        """Answer and deliver until the other end closes, one after the other, in the order in which calls came. Only what
        is answered by a task overlaps with others.
        """
        try:
            while (envelope := await self._receive()) is not None:
                if envelope.kind in (_ANSWER, _FAILURE):
                    self._settle(envelope)
                else:
                    await self._handle(envelope)
        finally:
            for future in self._answers.values():
                future.cancel()
            if not self._is_detaching:
                self._writer.close()
            self.ended.set()

    def notify(self, message: Message) -> None:
        """Send without waiting for anything; nothing happens when the other end is gone."""
        self._send(_NOTIFY, 0, message)

    async def call(self, message: Message, timeout_s: float) -> Message:
        """Send and wait for the answer. Raises ControlError when it is refused, late, or the channel closes."""
        number, self._next_number = self._next_number, self._next_number + 1
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._send(_CALL, number, message)
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise ControlError(f"no answer within {timeout_s:g} s: is the gateway overloaded?") from None
        except asyncio.CancelledError:
            if future.cancelled():
                raise ControlError("the gateway closed the control channel before it answered") from None
            raise
        finally:
            del self._answers[number]

    @property
    def peer_pid(self) -> int:
        """The process at the other end of a Unix socket, as the kernel knows it (SO_PEERCRED)."""
        sock = self._writer.get_extra_info("socket")
        (pid, _, _) = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        return int(pid)

    @property
    def waiting_bytes(self) -> int:
        """What was sent and has not left this process."""
        return self._writer.transport.get_write_buffer_size()

    def close(self) -> None:
        """Close this end."""
        self._writer.close()

    def _send(self, kind: Literal[0, 1, 2, 3], number: int, body: Message | str) -> None:
        if self._writer.is_closing():  # the other end is gone, and `serve` is about to say so
            return
        frame = self._encoder.encode(_Envelope(kind, number, body))
        self._writer.write(len(frame).to_bytes(4, "big") + frame)

    async def _receive(self) -> _Envelope | None:
        while (frame := self._take_frame()) is None:
            try:
                data = await self._reader.read(_READ_BYTES)
            except ConnectionError:
                return None
            if not data or len(self._rest) > _FRAME_BYTES_MAX:
                return None
            self._rest += data
        try:
            envelope = self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        is_text = isinstance(envelope.body, str)
        return None if is_text != (envelope.kind == _FAILURE) else envelope

    def _take_frame(self) -> bytes | None:
        """The next frame, when all of it is there."""
        end = _SIZE_BYTES + int.from_bytes(self._rest[:_SIZE_BYTES], "big")
        if len(self._rest) < max(end, _SIZE_BYTES):
            return None
        frame = bytes(self._rest[_SIZE_BYTES:end])
        del self._rest[:end]
        return frame

    def _settle(self, envelope: _Envelope) -> None:
        future = self._answers.get(envelope.number)
        if future is None or future.done():
            return
        if isinstance(envelope.body, str):
            future.set_exception(ControlError(envelope.body))
        else:
            future.set_result(envelope.body)

    async def _handle(self, envelope: _Envelope) -> None:
        assert self.handler is not None
        assert not isinstance(envelope.body, str)
        try:
            answer = await self.handler(envelope.body)
        except ControlError as exc:
            if envelope.kind == _CALL:
                self._send(_FAILURE, envelope.number, str(exc))
            return
        if isinstance(answer, asyncio.Task):
            assert envelope.kind == _CALL
            answer.add_done_callback(lambda task: self._answer_late(envelope.number, task))
        elif envelope.kind == _CALL:
            self._send(_ANSWER, envelope.number, answer if answer is not None else Done())

    def _answer_late(self, number: int, task: "asyncio.Task[Message]") -> None:
        if task.cancelled():
            self._send(_FAILURE, number, "it was given up: the gateway stops")
        elif (exc := task.exception()) is None:
            self._send(_ANSWER, number, task.result())
        elif isinstance(exc, ControlError):
            self._send(_FAILURE, number, str(exc))
        else:
            self._send(_FAILURE, number, f"internal error ({type(exc).__name__}): see the gateway's log")


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """The same path through /proc/self/fd: a socket's own may be 107 bytes at most, a data_dir's may be longer."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def unix_listener(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600, in place of one that a dead gateway left there."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        with _short_path(path) as short:
            sock.bind(short)
    finally:
        os.umask(mask)
    sock.listen(64)
    return sock


async def serve_unix(
    listening: socket.socket,
    connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> asyncio.Server:
    """Call `connected` for each client of a `unix_listener`. The socket's file stays where it is when the server closes."""
    if sys.version_info >= (
        3,
        13,
    ):  # where asyncio removes it, unless told not to: after an upgrade it is the successor's
        return await asyncio.start_unix_server(connected, sock=listening, cleanup_socket=False)
    return await asyncio.start_unix_server(connected, sock=listening)


@contextlib.asynccontextmanager
async def connect_unix(path: Path, handler: Handler | None = None) -> AsyncIterator[Channel]:
    """A channel to the gateway whose control socket is at `path`, for as long as the block runs.

    `handler` gets what the gateway says unasked, where something was asked for that it answers bit by bit.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(path) as short:
            sock.connect(short)
    except PermissionError as exc:
        sock.close()
        raise ControlError(
            f"{path}: permission denied: run this as the user that the gateway runs as"
        ) from exc
    except OSError as exc:
        sock.close()
        raise ControlError(f"{path}: no gateway answers there: start it with `gatewayctl run`") from exc
    sock.setblocking(False)
    channel = await Channel.over(sock, handler)
    serving = asyncio.get_running_loop().create_task(channel.serve())
    try:
        yield channel
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
