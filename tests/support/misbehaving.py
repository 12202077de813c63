"""A TLS 1.3 client that breaks rules on purpose, on tlslite-ng: its hello is edited, and it sends what it should not."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Self

from tlslite.api import HandshakeSettings, TLSConnection
from tlslite.errors import TLSAbruptCloseError, TLSRemoteAlert
from tlslite.extensions import TLSExtension
from tlslite.handshakehelpers import HandshakeHelpers
from tlslite.messages import ClientHello

from tests.support.devices import tcp_socket
from tests.support.gateway import Device

__all__ = ["Edit", "Misbehaving", "drop", "insert", "of_second_hello"]

PRE_SHARED_KEY = 41
TIMEOUT_S = 10.0

Edit = Callable[[ClientHello], None]


class Misbehaving(TLSConnection):  # type: ignore[misc]  # tlslite has no types
    """One connection. `edit` changes every hello; its binders are made anew afterwards, unless `keep_binders`."""

    def __init__(
        self,
        port: int,
        device: Device,
        *,
        edit: Edit | None = None,
        keep_binders: bool = False,
        **settings: object,
    ) -> None:
        super().__init__(tcp_socket(port, timeout_s=TIMEOUT_S))
        self._edit = edit
        self._keep_binders = keep_binders
        self._settings = HandshakeSettings()
        self._settings.minVersion = self._settings.maxVersion = (3, 4)
        self._settings.pskConfigs = [(device.identity.encode(), bytes.fromhex(device.key), "sha256")]
        for name, value in settings.items():
            setattr(self._settings, name, value)
        self.after_hello = b""
        """sent behind the first hello, as it is"""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def handshake(self) -> int | None:
        """The whole handshake; the alert that ended it, None when it succeeded."""
        try:
            self.handshakeClientCert(settings=self._settings)
        except TLSRemoteAlert as exc:
            return int(exc.description)
        return None

    def line(self, line: bytes = b"line\n") -> bytes:
        """Send a line, and give the answer to it."""
        self.write(line)
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self.read(min=1, max=100)
        return answer

    def send_message(self, kind: int, body: bytes) -> None:
        """A record of this type under the keys of the session."""
        for _ in self._sendMsg(_Raw(kind, body)):
            pass

    def alert(self) -> int | None:
        """Read to the end; the alert, None without one."""
        try:
            while self.read(min=1, max=1000):
                pass
        except TLSRemoteAlert as exc:
            return int(exc.description)
        except TLSAbruptCloseError:
            pass
        return None

    def _sendMsg(self, msg: object, *args: object, **options: object) -> Iterator[object]:  # noqa: N802 - tlslite's
        is_hello = isinstance(msg, ClientHello)
        if is_hello and self._edit is not None:
            self._edit(msg)
            if not self._keep_binders and msg.extensions[-1].extType == PRE_SHARED_KEY:  # type: ignore[attr-defined]
                HandshakeHelpers.update_binders(msg, self._handshake_hash, self._settings.pskConfigs)
        yield from super()._sendMsg(msg, *args, **options)
        if is_hello and self.after_hello:
            with contextlib.suppress(ConnectionError):
                self.sock.sendall(self.after_hello)
            self.after_hello = b""


class _Raw:
    """A message of bytes, as tlslite wants one."""

    def __init__(self, kind: int, body: bytes) -> None:
        self.contentType = kind
        self._body = body

    def write(self) -> bytearray:
        return bytearray(self._body)


def drop(kind: int) -> Edit:
    """Leave an extension out."""

    def edit(hello: ClientHello) -> None:
        hello.extensions = [each for each in hello.extensions if each.extType != kind]

    return edit


def insert(kind: int, content: bytes = b"") -> Edit:
    """Put an extension in front."""

    def edit(hello: ClientHello) -> None:
        hello.extensions.insert(0, TLSExtension(extType=kind).create(kind, bytearray(content)))

    return edit


def of_second_hello(edit: Edit) -> Edit:
    """Only change the hello that answers a HelloRetryRequest."""
    hellos = 0

    def edit_second(hello: ClientHello) -> None:
        nonlocal hellos
        hellos += 1
        if hellos == 2:
            edit(hello)

    return edit_second
