"""A device that a test drives by hand: blocking, on the client end of the gateway's own TLS."""

import select
import socket
import time
from types import TracebackType
from typing import Self

from gateway.tls.openssl import ClientContext, TlsVersion
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import ClientSession, Established, Failed, PeerClosed

__all__ = ["Refused", "Session", "hint_of", "is_accepted"]

TIMEOUT_S = 10.0


class Refused(Exception):
    """The gateway did not let the device in."""


class Session:
    """One established session. Every wait ends after `TIMEOUT_S` with an OSError."""

    def __init__(
        self, port: int, identity: str, key: str, *, highest: TlsVersion = TlsVersion.TLS1_3
    ) -> None:
        context = ClientContext(
            PROFILES[ProfileName.COMPATIBLE].tls12_suites, TLS13_SUITES["sha256"], highest=highest
        )
        self.hints: list[bytes | None] = []

        def keys(hint: bytes | None) -> tuple[bytes, bytes, str]:
            self.hints.append(hint)
            return identity.encode(), bytes.fromhex(key), "sha256"

        self._tls = ClientSession(context, keys)
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._received = bytearray()
        self._established = self._ended = False
        try:
            self._handshake()
        except BaseException:
            self._socket.close()
            raise

    def _handshake(self) -> None:
        self._flush()
        while not self._established:
            self._read()
            if self._ended:
                raise Refused("the gateway closed the connection in the handshake")

    def ask(self, line: bytes) -> bytes:
        """Send a line, and give the answer."""
        self._tls.send(line + b"\n")
        self._flush()
        while b"\n" not in self._received:
            assert not self._ended, "the gateway ended the session"
            self._read()
        answer, _, rest = self._received.partition(b"\n")
        self._received = rest
        return bytes(answer)

    def is_open(self) -> bool:
        """Whether the gateway has not ended the session; does not wait."""
        if not self._ended and select.select([self._socket], [], [], 0)[0]:
            self._read()
        return not self._ended

    def wait_until_ended(self, timeout_s: float = TIMEOUT_S) -> float:
        """When the gateway ended the session, Unix seconds."""
        deadline = time.monotonic() + timeout_s
        while not self._ended:
            left = deadline - time.monotonic()
            assert left > 0, f"the session is still open after {timeout_s} s"
            if select.select([self._socket], [], [], left)[0]:
                self._read()
        return time.time()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(65_536)
        except ConnectionResetError:
            data = b""
        if not data:
            self._ended = True
            return
        for event in self._tls.receive(data):
            match event:
                case Established():
                    self._established = True
                case bytes():
                    self._received += event
                case PeerClosed():
                    self._ended = True
                case Failed():
                    if not self._established:
                        raise Refused(str(event.error))
                    self._ended = True
        self._flush()

    def _flush(self) -> None:
        output = self._tls.output()
        if output:
            self._socket.sendall(output)


def is_accepted(port: int, identity: str, key: str) -> bool:
    """Whether a device gets in, and its messages are taken, now."""
    try:
        with Session(port, identity, key) as session:
            return session.ask(b"hello") == b"ok 1"
    except (Refused, ConnectionError):
        return False


def hint_of(port: int, identity: str, key: str) -> str | None:
    """The identity hint that a TLS 1.2 client is shown now."""
    with Session(port, identity, key, highest=TlsVersion.TLS1_2) as session:
        hint = session.hints[-1]
        return None if hint is None else hint.decode()
