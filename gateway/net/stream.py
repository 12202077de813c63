"""A connected TCP socket as a transport of asyncio, on a `Poller` in the place of the event loop.

It does what the event loops' own transports do and these protocols need, with half the system calls and objects: bytes
are written at once, and kept only when the kernel takes no more.

Reading is edge-triggered: an event says that something came since the last one. A read that brings less than READ_BYTES has
emptied the socket; one that brings as much is followed by another in the next turn, and so is one behind which the peer has
ended its side, whose end is to be seen too. A paused stream remembers that there was an event.
"""

import asyncio
import contextlib
import select
import socket
from typing import Any, Final

from gateway.net.poller import EDGES, Poller

__all__ = ["BUFFERED_BYTES_MAX", "READ_BYTES", "SEND", "SEND_LAST", "Stream"]

_WRITABLE: Final = EDGES | select.EPOLLOUT
_READS: Final = ~select.EPOLLOUT
_ENDS: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_ENDED: Final = select.EPOLLIN | select.EPOLLRDHUP
_DONT_WAIT: Final = socket.MSG_DONTWAIT
SEND: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
SEND_LAST: Final = SEND | socket.MSG_MORE
READ_BYTES: Final = 64 * 1024
"""One read, at the most: four full records."""
BUFFERED_BYTES_MAX: Final = 64 * 1024
"""What may wait for a slow reader before its protocol is told to pause."""


class Stream(asyncio.Transport):
    """One connection. `host` is the numeric address of the other end, empty for a Unix socket.

    What a protocol raises ends its connection and is told to the loop's exception handler, as with any transport.
    """

    __slots__ = (
        "_descriptor", "_error", "_finishing", "_high", "_is_closing", "_is_ended", "_is_lost", "_is_paused",
        "_is_readable", "_is_writing_paused", "_protocol", "_rest", "_sock", "host", "is_newcomer", "poller",
    )  # fmt: skip

    def __init__(
        self, poller: Poller, sock: socket.SocketType, host: str, protocol: asyncio.Protocol
    ) -> None:
        self.poller = poller
        self._sock = sock
        self._descriptor = sock.fileno()
        self._protocol = protocol
        self._rest: bytearray | None = None  # what the kernel did not take yet
        self._high = BUFFERED_BYTES_MAX
        self._error: Exception | None = None
        self._is_paused = False
        self._is_readable = False  # there was an event while paused, or there is more than one read
        self._is_writing_paused = False
        self._finishing = False  # FIN goes out behind the rest
        self._is_ended = False  # the peer's FIN was seen
        self._is_closing = False
        self._is_lost = False
        self.host = host
        self.is_newcomer = True
        """Until the owner says otherwise."""

    def start(self, *, is_registered: bool = False) -> None:
        """Tell the protocol of its connection, and begin to read."""
        try:
            self._protocol.connection_made(self)
        except Exception as exc:  # noqa: BLE001 - as in `ready`
            self._fatal(exc)
        if not (is_registered or self._is_lost):
            self.poller.add(self._descriptor, self, EDGES)

    # From the poller

    def ready(self, events: int) -> None:
        """Something happened on the socket: write what waits, read once, and see to it that what is left is read too."""
        try:
            if self._rest is not None:
                if events & select.EPOLLOUT:
                    self._write_on()
                if not events & _READS:
                    return
            if self._is_paused:
                self._is_readable = True
                return
            if self._is_closing or self._is_ended:
                return
            try:
                data = self._sock.recv(READ_BYTES, _DONT_WAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                self._lose(exc)
                return
            if not data:
                self._ended()
                return
            self._protocol.data_received(data)
            if (events & _ENDS or len(data) == READ_BYTES) and not self._is_closing:
                self._is_readable = True
                if not self._is_paused:
                    self.poller.put_off(self._read_on)
        except Exception as exc:  # noqa: BLE001 - the connection's boundary: it ends, the others go on
            self._fatal(exc)

    def _ended(self) -> None:
        """The peer's FIN."""
        self._is_ended = True
        if not self._protocol.eof_received():
            self.close()

    def _read_on(self) -> None:
        if self._is_readable and not self._is_paused:
            self._is_readable = False
            self.ready(_ENDED)

    def _write_on(self) -> None:
        assert self._rest is not None
        try:
            sent = self._sock.send(self._rest, SEND)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(exc)
            return
        if sent < len(self._rest):
            del self._rest[:sent]
        else:
            self._rest = None
            self.poller.change(self._descriptor, EDGES)
            if self._finishing:
                self._shut_down()
        if self._is_writing_paused and (self._rest is None or len(self._rest) <= self._high // 4):
            self._is_writing_paused = False
            self._protocol.resume_writing()
        if self._is_closing and self._rest is None:
            self._lose(None)

    # asyncio.Transport

    def set_protocol(self, protocol: asyncio.Protocol) -> None:  # type: ignore[override]  # asyncio has a wider type
        """Let another protocol have what comes from now on; `connection_made` of it is the caller's to call."""
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview, flags: int = SEND) -> None:
        """Send now, or keep what the kernel does not take.

        With SEND_LAST, `write_eof` or `close` has to follow at once: the FIN leaves in one segment with it.
        """
        if self._rest is not None:
            self._rest += data
        elif self._is_closing:
            return
        else:
            try:
                sent = self._sock.send(data, flags)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._lose(exc)
                return
            if sent == len(data):
                return
            self._rest = bytearray(memoryview(data)[sent:])
            self.poller.change(self._descriptor, _WRITABLE)
        if len(self._rest) > self._high and not self._is_writing_paused:
            self._is_writing_paused = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        """TCP can."""
        return True

    def write_eof(self) -> None:
        """FIN, behind what was written."""
        self._finishing = True
        if self._rest is None and not self._is_closing:
            self._shut_down()

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:  # the peer has reset the connection
            self._lose(exc)

    def pause_reading(self) -> None:
        """Do not read until `resume_reading`."""
        self._is_paused = True

    def resume_reading(self) -> None:
        """Read again, in the next turn, what came meanwhile."""
        self._is_paused = False
        if self._is_readable:
            self.poller.put_off(self._read_on)

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the connection is lost."""
        return self._is_closing

    def close(self) -> None:
        """Read nothing more, and be gone once everything is written."""
        if not self._is_closing:
            self._is_closing = True
            if self._rest is None:
                self._lose(None)

    def abort(self) -> None:
        """Be gone, whatever waits to be written."""
        self._lose(None)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """`pause_writing` above `high` bytes; `resume_writing` at a quarter of that."""
        assert low is None, "a quarter of `high`"
        self._high = BUFFERED_BYTES_MAX if high is None else high

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return 0 if self._rest is None else len(self._rest)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`peername`, `sockname`, `socket`."""
        if name == "socket":
            return self._sock
        if name == "sockname":
            return self._sock.getsockname()
        if name == "peername":
            with contextlib.suppress(OSError):  # it has reset the connection
                return self._sock.getpeername()
        return default

    # The end

    def _lose(self, error: Exception | None) -> None:
        """The connection is over; the protocol hears of it after what runs now."""
        self._is_closing = True
        if not self._is_lost:
            self._is_lost = True
            self._error = error
            self._rest = None
            self.poller.put_off(self._lost)

    def _fatal(self, exc: Exception) -> None:
        self.poller.loop.call_exception_handler(
            {
                "message": "a protocol failed: its connection is cut",
                "exception": exc,
                "protocol": self._protocol,
            }
        )
        self._lose(exc)

    def _lost(self) -> None:
        try:
            self._protocol.connection_lost(self._error)
        except Exception as exc:  # noqa: BLE001 - as in `ready`
            self.poller.loop.call_exception_handler(
                {"message": "a protocol failed at its end", "exception": exc, "protocol": self._protocol}
            )
        self.poller.remove(self._descriptor)
        self._sock.close()
