"""A sidecar for programs that know no TLS: plain TCP in, one TLS-PSK connection to the gateway for each, bytes both ways.

Each direction ends on its own: the end of a plain client's input becomes close_notify, and the gateway's close_notify the
end of its output. What was cut on one side is cut on the other (a reset, never an end that looks orderly), because bytes
may be missing. Memory is bounded: while one side's buffer is above its high-water mark, the other side is not read; nor
is a client before its link is there. A link that could not be opened is tried again while the client has patience for it,
all clients on one back-off; a stream that broke cannot be mended, so its client has to come again.

A connection has a task only until its link is open; then two protocols call each other.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import socket
from typing import Final, cast

import structlog

from gateway.device.backoff import BackOff
from gateway.device.link import READ_BYTES, Dialer, Link
from gateway.errors import DeviceError, DeviceRefused
from gateway.net.address import address_text

__all__ = ["Tunnel", "TunnelSettings"]

log = structlog.get_logger()

BUFFER_BYTES: Final = 64 * 1024
"""What may wait for a plain client before the gateway is not read any more; one read comes on top at the most."""
BACK_OFF_FIRST_S: Final = 0.1
BACK_OFF_LONGEST_S: Final = 5.0

_read_buffer = memoryview(bytearray(READ_BYTES))
"""One for all plain clients of the process: the bytes are encrypted before the event loop reads again."""


@dataclasses.dataclass(frozen=True, slots=True)
class TunnelSettings:
    """What a tunnel may be told."""

    patience_s: float = 10.0
    """How long a plain client waits for its link while the gateway is away, further tries included."""
    connections_max: int = 10_000
    """Plain clients at a time; each costs about 40 KB."""


class Tunnel:
    """Listens for plain clients as long as it is open."""

    def __init__(self, dialer: Dialer, settings: TunnelSettings | None = None) -> None:
        self.dialer = dialer
        self.settings = settings or TunnelSettings()
        self.connections: set[TunnelConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._back_off = BackOff(BACK_OFF_FIRST_S, BACK_OFF_LONGEST_S)
        self._next_try_at = 0.0

    async def open(self, host: str, port: int) -> tuple[str, int]:
        """Listen; the address that it became. Raises DeviceError when the port is not to be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: TunnelConnection(self), host, port, backlog=1024)
        except OSError as exc:
            raise DeviceError(
                f"cannot listen on {address_text(host, port)}: {_plain(exc)}: choose another --listen, or stop who has it"
            ) from exc
        name = self._server.sockets[0].getsockname()
        return name[0], name[1]

    async def close(self) -> None:
        """Stop listening and end every connection in an orderly way."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self.connections):
            connection.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while self.connections:  # noqa: ASYNC110 - at the very end, and seldom more than once
                    await asyncio.sleep(0.02)
        for connection in tuple(self.connections):
            connection.abort()

    def dial(self, connection: "TunnelConnection") -> None:
        """Open the link of a plain client, in a task that ends with it."""
        task = asyncio.get_running_loop().create_task(self._dial(connection))
        connection.connecting = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self, connection: "TunnelConnection") -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self.settings.patience_s
        while True:
            now = loop.time()
            wait_s = (self._next_try_at - now) * random.uniform(1, 1.5)  # noqa: S311 - spreads load, guards nothing
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, give_up_at - now))
            try:
                await self.dialer.connect(connection)
            except DeviceError as exc:
                now = loop.time()
                if isinstance(exc, DeviceRefused) or now >= give_up_at:
                    log.warning("link_failed", reason=str(exc))
                    connection.abort()
                    return
                if now >= self._next_try_at:  # else a failure of the same moment has seen to it
                    self._next_try_at = now + self._back_off.next()
            else:
                self._back_off.reset()
                self._next_try_at = 0.0
                return


class TunnelConnection(asyncio.BufferedProtocol):
    """One plain client: a protocol towards it, the owner of its link to the gateway."""

    __slots__ = ("_early", "_link", "_plain", "_plain_finished", "_tunnel", "connecting")

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._plain: asyncio.Transport | None = None
        self._link: Link | None = None
        self._early = b""
        self._plain_finished = False
        self.connecting: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End both sides; what was received is still passed on."""
        if self._link is not None:
            self._link.close()
        if self._plain is not None:
            self._plain.close()

    def abort(self) -> None:
        """Cut both sides."""
        if self._link is not None:
            self._link.abort()
        if self._plain is not None:
            _reset(self._plain)

    # From the plain client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open a link for it; until then it is not read."""
        self._plain = transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        tunnel = self._tunnel
        if len(tunnel.connections) >= tunnel.settings.connections_max:
            log.warning("client_refused", reason=f"{tunnel.settings.connections_max} clients are connected")
            transport.abort()
            return
        tunnel.connections.add(self)
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        transport.pause_reading()
        tunnel.dial(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Where the client's bytes go."""
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Pass bytes on to the gateway."""
        if self._link is not None:
            self._link.send(bytes(_read_buffer[:nbytes]))
        else:
            self._early += _read_buffer[:nbytes]  # at most one read: it is paused

    def eof_received(self) -> bool:
        """The client ended its side; the other direction goes on until the gateway ends it, too."""
        self._plain_finished = True
        if self._link is not None:
            self._link.finish()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: nothing more can go either way."""
        self._plain = None
        self._tunnel.connections.discard(self)
        if self._link is None:
            if self.connecting is not None:
                self.connecting.cancel()
        elif exc is None:
            self._link.close()
        else:
            self._link.abort()

    def pause_writing(self) -> None:
        """The client reads slowly: do not read the gateway."""
        if self._link is not None:
            self._link.pause_receiving()

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._link is not None:
            self._link.resume_receiving()

    # From the link

    def link_opened(self, link: Link) -> None:
        """Let bytes through."""
        self._link = link
        if self._plain is None:
            link.close()
            return
        if self._early:
            link.send(self._early)
            self._early = b""
        if self._plain_finished:
            link.finish()
        elif not self._plain.is_closing():
            self._plain.resume_reading()

    def link_received(self, data: bytes) -> None:
        """Pass bytes on to the client."""
        if self._plain is not None and not self._plain.is_closing():
            self._plain.write(data)

    def link_finished(self) -> None:
        """Pass the end on to the client; when both have ended, all is over."""
        if self._plain is None or self._plain.is_closing():
            return
        if self._plain_finished:
            self._plain.close()
        else:
            self._plain.write_eof()

    def link_lost(self, error: DeviceError | None) -> None:
        """The link is gone: so is the client, cut when the link was."""
        self._link = None
        if error is not None:
            log.warning("link_lost", reason=str(error))
        if self._plain is None:
            return
        if error is None:
            self._plain.close()
        else:
            _reset(self._plain)

    def pause_sending(self) -> None:
        """The gateway reads slowly: do not read the client."""
        if self._plain is not None and not self._plain.is_closing():
            self._plain.pause_reading()

    def resume_sending(self) -> None:
        """It reads again."""
        if self._plain is not None and not self._plain_finished and not self._plain.is_closing():
            self._plain.resume_reading()


def _reset(transport: asyncio.Transport) -> None:
    """Close with a reset: what the client has read is not all there was."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # it is gone already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    transport.abort()


def _plain(exc: OSError) -> str:
    """The system's words; those of asyncio have the address in them once more."""
    return os.strerror(exc.errno).lower() if exc.errno is not None else str(exc)
