"""The socket's side of a connection: its phase, its deadline, and its end, which is never to take bytes away from the peer."""

import asyncio
import enum
import socket
import struct
from asyncio.trsock import TransportSocket
from typing import Final

from gateway.net.poller import Poller
from gateway.net.stream import SEND, SEND_LAST, Stream
from gateway.server.connections.services import Services
from gateway.server.sessions.bulk import BULK_BYTES
from gateway.tls.session import ServerSession

__all__ = ["CLOSING", "GONE", "HANDSHAKE", "LIVE", "STOP_S", "EndingConnection", "acknowledged_bytes"]

LINGER_S: Final = 2.0
"""How long a peer may take to read the end of a session before its connection is cut."""
STOP_S: Final = 0.2
"""How long a session that the gateway ends may take to settle what is under way."""

_U64: Final = struct.Struct("=Q")
_BYTES_ACKED_AT: Final = 120
"""tcpi_bytes_acked in struct tcp_info (linux/tcp.h), which only grows at its end."""
_TCP_INFO_BYTES: Final = _BYTES_ACKED_AT + _U64.size


def acknowledged_bytes(sock: socket.socket | TransportSocket) -> int:
    """How many bytes the peer's TCP has acknowledged since the connection was accepted, its end counted as one.

    What waits to be sent would tell the same while the connection lives; but a reset throws that away, and does not
    count here. Raises OSError when the socket is closed.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    (acknowledged,) = _U64.unpack_from(info, _BYTES_ACKED_AT)
    assert isinstance(acknowledged, int)
    return acknowledged


class Phase(enum.Enum):
    """Where a connection stands."""

    HANDSHAKE = enum.auto()
    LIVE = enum.auto()
    CLOSING = enum.auto()
    GONE = enum.auto()


HANDSHAKE: Final = Phase.HANDSHAKE
LIVE: Final = Phase.LIVE
CLOSING: Final = Phase.CLOSING
GONE: Final = Phase.GONE
"""Names of their own: Python 3.11 takes 100 ns to find a member by its class, 20 times for each connection."""


class EndingConnection(asyncio.Protocol):
    """What a connection has in common whoever is at its end."""

    __slots__ = (
        "_finished", "_is_penalised", "_last_words", "_opening", "_peer_finished", "_receiving", "_services", "_session", "_stopping", "_transmitted",
        "_transport", "deadline", "phase", "slot",
    )  # fmt: skip

    def __init__(self, services: Services, session: ServerSession) -> None:
        self._services = services
        self._session = session
        self._transport: Stream | None = None
        self._transmitted = 0
        self._last_words = b""
        self._is_penalised = False
        self._opening = False
        self._receiving = False
        self._finished = False
        self._stopping = False
        self._peer_finished = False
        self.phase = GONE
        self.deadline = 0.0
        self.slot = 0

    @property
    def poller(self) -> Poller:
        """Where its socket stands."""
        assert self._transport is not None
        return self._transport.poller

    def deadline_passed(self) -> None:
        """The phase took too long. The deadline is not filed any more."""
        raise NotImplementedError

    def configuration_changed(self, services: Services) -> None:
        """Other settings are in force."""
        raise NotImplementedError

    def stop(self, reason: str, within_s: float = STOP_S) -> None:
        """End in an orderly way, within `within_s` seconds."""
        raise NotImplementedError

    def finish(self) -> None:
        """Say close_notify and end our direction."""
        if self.phase is not LIVE or self._finished:
            return
        self._finish(is_end=False)

    def _finish(self, *, is_end: bool) -> None:
        self._finished = True
        self._session.close()
        self._flush(SEND_LAST if is_end or self._peer_finished else SEND)
        self._close_if_both_finished()

    def close(self) -> None:
        """Say close_notify, drop what comes in, and be gone within LINGER_S."""
        if self.phase is LIVE and not self._finished:
            self._finish(is_end=True)
        if self.phase is LIVE:
            self._linger()

    def pause_receiving(self) -> None:
        """Do not read the device."""
        if self.phase is LIVE and self._receiving:
            self._receiving = False
            assert self._transport is not None
            self._transport.pause_reading()

    def resume_receiving(self) -> None:
        """Read the device again."""
        if not self._receiving and self.phase is not GONE:
            self._receiving = True
            assert self._transport is not None
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def has_acknowledged(self, mark: int) -> bool | None:
        """Whether the device's TCP has acknowledged everything up to `mark`; None when the connection is gone."""
        if self.phase is GONE or self._transport is None:
            return None
        try:
            return acknowledged_bytes(self._transport.get_extra_info("socket")) >= mark
        except OSError:  # closed, and we are told of it in a moment
            return None

    # Inside

    def _flush(self, flags: int = SEND) -> None:
        """Transmit what the TLS session wants to say; with SEND_LAST our FIN comes at once after it."""
        output = self._session.output()
        if output and self._transport is not None:
            size = len(output)
            self._transmitted += size
            self._transport.write(output, flags)
            if size > BULK_BYTES:
                self._services.bulk.add(self._session)

    def _close_if_both_finished(self) -> None:
        if self._finished and self._peer_finished and self._transport is not None:
            self.phase = CLOSING if self.phase is LIVE else self.phase
            self._transport.close()
            if self._transport.get_write_buffer_size():
                self._expect_within(LINGER_S)

    def _linger(self) -> None:
        """Say the last words, then FIN, and wait for the peer's own end, LINGER_S at most."""
        self._flush(SEND_LAST)
        if self.phase is GONE or self._transport is None:
            return
        self.phase = CLOSING
        if self._peer_finished:
            self._transport.close()
            return
        self.resume_receiving()
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
        self._expect_within(LINGER_S)

    def _hold(self, seconds: float, *, is_penalty: bool) -> None:
        """Keep the alert of a failed handshake back for so long."""
        self._last_words = self._session.output()
        self._session.free()  # nothing else of it is needed, and it is most of what a connection holds
        self._is_penalised = is_penalty
        if not self._last_words:
            self._linger()
        elif is_penalty:
            self._expect_from_now_on(seconds)
        else:
            self._services.later(seconds, self._say_last_words)

    def _say_last_words(self) -> None:
        """The time of an alert that was held back has come, unless its peer is gone."""
        if self.phase is not CLOSING or not self._last_words:
            return
        assert self._transport is not None
        self._transport.write(self._last_words)
        self._last_words = b""
        self._linger()

    def _put_off_idle(self) -> None:
        """There is traffic. A session that is being ended, or was not opened in time, is ended all the same."""
        if not (self._stopping or self._opening):
            self.deadline = self._services.now() + self._services.idle_timeout_s

    def _expect_from_now_on(self, seconds: float) -> None:
        """Put another deadline in the place of the one there is, earlier or later."""
        filed, self.deadline = self.deadline, self._services.now() + seconds
        if self.deadline < filed:
            self._services.deadlines.bring_forward(self)

    def _expect_within(self, seconds: float) -> None:
        now = self._services.now()
        if now + seconds < self.deadline or self.deadline <= now:  # passed: this is the next one
            self.deadline = now + seconds
            self._services.deadlines.bring_forward(self)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
