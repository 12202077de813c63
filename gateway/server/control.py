"""The control channel: between the supervisor and its children, and between gatewayctl and the supervisor.

A channel is a Unix stream of frames: a 4-byte length (big-endian) and a msgpack envelope. Either end may `notify`
(no answer), or `call` (exactly one answer, or the caller's deadline passes). The messages are the Structs below.
The peer is always this program, or root, or the user that owns the socket (0600); a frame that does not parse ends the
channel all the same.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from gateway.errors import ControlError
from gateway.registry.notices import Changed, Published
from gateway.server.trace_messages import (
    KeyLogLine,
    StartTrace,
    StopTrace,
    TraceEvents,
    TraceOver,
    TraceStarted,
)
from gateway.telemetry.aggregate import Family

__all__ = [
    "Channel",
    "CheckReaders",
    "Collect",
    "CommandDelivered",
    "CommandOutcome",
    "Configure",
    "DeadLetterInfo",
    "DeadLetters",
    "DiscardDeadLetters",
    "Done",
    "Drain",
    "EndSession",
    "FollowerStatus",
    "Kick",
    "ListDeadLetters",
    "ListSessions",
    "Metrics",
    "Newcomers",
    "RetryDeadLetters",
    "SendCommand",
    "SessionClosed",
    "SessionInfo",
    "SessionOpened",
    "Sessions",
    "Used",
    "connect_unix",
    "unix_listener",
]

_CREDENTIALS: Final = struct.Struct("3i")
"""Of a peer: process, user and group."""
_FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""A list of 100,000 sessions is some 20 MB."""


class Configure(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to a child, once, first: its settings as JSON, and the listening sockets it inherited."""

    settings: bytes
    worker: int = 0
    workers: int = 1
    sockets: dict[str, list[int]] = {}
    """listener name -> inherited file descriptors, one per worker; a worker accepts on the one at its own place"""


class FollowerStatus(msgspec.Struct, tag=True, frozen=True):
    """What the follower knows, for readiness and logs. Times are Unix seconds, 0 for never."""

    state: str
    """`starting`, `copying`, `following`, `away` or `mismatch`"""
    detail: str
    sequence: int
    polled_at: float


class Collect(msgspec.Struct, tag=True, frozen=True):
    """Ask for the metrics of a process."""


class Metrics(msgspec.Struct, tag=True, frozen=True):
    """The metrics of a process."""

    families: list[Family]


class ListSessions(msgspec.Struct, tag=True, frozen=True):
    """Ask for live sessions, all or those of one realm, device name or route."""

    realm: str | None = None
    device: str | None = None
    route: str | None = None


class SessionInfo(msgspec.Struct, frozen=True):
    """One live session. `since` is Unix seconds; bytes are of payload; `messages` is None where there are only bytes."""

    session: str
    connection: str
    worker: str
    realm: str
    device: str
    identity: str
    address: str
    listener: str
    route: str
    tls_version: str
    cipher: str
    since: float
    received_bytes: int
    sent_bytes: int
    messages: int | None


class Sessions(msgspec.Struct, tag=True, frozen=True):
    """Live sessions."""

    sessions: list[SessionInfo]


class Kick(msgspec.Struct, tag=True, frozen=True):
    """End the sessions of a device, in an orderly way."""

    realm: str
    device: str


class SendCommand(msgspec.Struct, tag=True, frozen=True):
    """A command for a connected device, answered by a CommandOutcome after `timeout_s` seconds at most.

    The supervisor fills in the session that is to get it.
    """

    realm: str
    device: str
    id: str
    payload: bytes
    timeout_s: float
    session: str = ""


class CommandOutcome(msgspec.Struct, tag=True, frozen=True):
    """What became of a command.

    `delivered`: the device's TCP has it all. `not_connected`: there is no session of the device. `refused`: its route
    or its framing cannot carry it. `unacknowledged`: sent, and not acknowledged in time. `lost`: the connection broke.
    """

    id: str
    state: str
    detail: str


class CommandDelivered(msgspec.Struct, tag=True, frozen=True):
    """A command that waited in the registry was delivered: it waits no longer."""

    device_id: int
    number: int


class ListDeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Ask for up to `limit` dead letters, of all routes or of one."""

    limit: int
    route: str | None = None


class DeadLetterInfo(msgspec.Struct, frozen=True):
    """One message that is not tried any more. Times are Unix seconds; `event` is the id that the backend would see."""

    id: str
    route: str
    realm: str
    device: str
    identity: str
    event: str
    received_at: float
    at: float
    reason: str
    payload: bytes


class DeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Dead letters, and how many there are in all."""

    letters: list[DeadLetterInfo]
    total: int


class RetryDeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Deliver the dead letters with these ids again, or all."""

    ids: list[str] | None
    route: str | None = None


class DiscardDeadLetters(msgspec.Struct, tag=True, frozen=True):
    """Delete the dead letters with these ids, or all."""

    ids: list[str] | None
    route: str | None = None


class Used(msgspec.Struct, tag=True, frozen=True):
    """Worker to follower: credentials that were used today, by id, and when (Unix seconds)."""

    credentials: dict[int, float]


class Newcomers(msgspec.Struct, tag=True, frozen=True):
    """Worker to follower: identities that proved the key which their realm derives, as realm id, identity, address."""

    identities: list[tuple[int, str, str]]


class SessionOpened(msgspec.Struct, tag=True, frozen=True):
    """Worker to supervisor: a session of a device that may have `limit` of them on this node. `since` is Unix seconds."""

    device_id: int
    session: str
    since: float
    limit: int


class SessionClosed(msgspec.Struct, tag=True, frozen=True):
    """Worker to supervisor: a session that it was told of is gone."""

    device_id: int
    session: str


class EndSession(msgspec.Struct, tag=True, frozen=True):
    """Supervisor to worker: a newer session took the place of this one, at `since` (Unix seconds)."""

    device_id: int
    session: str
    since: float


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Stop accepting, end all sessions within `drain_s` seconds, and exit."""

    drain_s: float


class CheckReaders(msgspec.Struct, tag=True, frozen=True):
    """A worker died: free the places that it held in the replica."""


class Done(msgspec.Struct, tag=True, frozen=True):
    """A call succeeded; `count` things were touched."""

    count: int = 0


Message = (
    Configure
    | CheckReaders
    | Published
    | Changed
    | FollowerStatus
    | Collect
    | Metrics
    | ListSessions
    | Sessions
    | Kick
    | SendCommand
    | CommandOutcome
    | CommandDelivered
    | ListDeadLetters
    | DeadLetters
    | RetryDeadLetters
    | DiscardDeadLetters
    | Used
    | Newcomers
    | SessionOpened
    | SessionClosed
    | EndSession
    | StartTrace
    | TraceStarted
    | StopTrace
    | TraceEvents
    | KeyLogLine
    | TraceOver
    | Drain
    | Done
)
"""`Published` and `Changed` are the notices of the registry's follower, sent as they are."""


class _Envelope(msgspec.Struct, array_like=True):
    kind: Literal[0, 1, 2, 3]
    number: int
    body: Message | str


_NOTIFY: Final = 0
_CALL: Final = 1
_ANSWER: Final = 2
_FAILURE: Final = 3

Handler = Callable[[Message], Awaitable[Message | None]]


class Channel:
    """One end of a control channel. `serve` runs it until the other end closes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.handler = handler
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Envelope)
        self.ended = asyncio.Event()
        """Set when `serve` is over."""

    @classmethod
    async def over(cls, sock: socket.socket, handler: Handler | None = None) -> Self:
        """A channel on a connected stream socket, which it owns from now on."""
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, handler)

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
        """Answer and deliver until the other end closes. Calls run one after the other, in the order they came."""
        try:
            while (envelope := await self._receive()) is not None:
                if envelope.kind in (_ANSWER, _FAILURE):
                    self._settle(envelope)
                else:
                    await self._handle(envelope)
        finally:
            self.ended.set()
            for future in self._answers.values():
                future.cancel()
            self._writer.close()

    def notify(self, message: Message) -> None:
        """Send without waiting for anything; nothing happens when the other end is gone."""
        self._send(_NOTIFY, 0, message)

    async def call(self, message: Message, timeout_s: float) -> Message:
        """Send and wait for the answer. Raises ControlError when it is refused, late, or the channel closes."""
        number = next(self._numbers)
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
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > _FRAME_BYTES_MAX:
                return None
            envelope = self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        is_text = isinstance(envelope.body, str)
        return None if is_text != (envelope.kind == _FAILURE) else envelope

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
        if envelope.kind == _CALL:
            self._send(_ANSWER, envelope.number, answer if answer is not None else Done())


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
