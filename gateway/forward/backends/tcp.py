"""The `tcp` backend: one connection to a service for every stream session, plain or with TLS.

With `proxy_protocol` each connection begins with a PROXY protocol version 2 header that tells the service who the device
is. It is sent in plain text, before the TLS handshake where there is one, as haproxy sends it.

TLS knows no half-closed connection here: over `tls://` the service does not learn that a device ended its side before
the device closes.
"""

import asyncio
import ipaddress
import math
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import BackendModel, TlsSettings, os_error_text, parse_broker_url
from gateway.forward.session import DeviceInfo
from gateway.net.address import address_text
from gateway.net.connector import USER_TIMEOUT_MS, Attempts, Connecting
from gateway.net.poller import Poller
from gateway.net.stream import READ_BYTES, Stream
from gateway.wire.proxy_protocol import encode_proxy_header

__all__ = ["TLV_DEVICE", "TLV_IDENTITY", "TLV_REALM", "TcpBackend", "TcpSettings"]

TLV_REALM: Final = 0xE4
TLV_DEVICE: Final = 0xE5
TLV_IDENTITY: Final = 0xE6
"""Types of the range that the specification reserves for applications (0xE0 to 0xEF)."""

_BACK_OFF_FIRST_S = 0.1
_BACK_OFF_MAX_S = 5.0
_KNOWN_S = 2.0
"""So long sessions go where a name led, without asking the resolver again: a fleet that comes back asks once."""

_Address = tuple[int, Any]
"""Family, and what a socket of it connects to."""


def _service_url(url: str) -> str:
    what = "write tcp://host:port or tls://host:port"
    try:
        parts = parse_broker_url(url, _SCHEMES)
    except ValueError:
        # Not repeated when it may hold a password.
        raise ValueError(
            f"{'it' if '@' in url else repr(url)} is not the URL of a TCP service: {what}"
        ) from None
    if parts.username or not parts.port:
        raise ValueError(f"it has {'a user' if parts.username else 'no port'}: {what}")
    return url


_SCHEMES: Final = {"tcp": 0, "tls": 0}


class TcpSettings(TlsSettings, BackendModel):
    """`[backends.NAME]` with `kind = "tcp"`."""

    kind: Literal["tcp"]
    url: Annotated[
        str,
        AfterValidator(_service_url),
        Field(description="The service, as tcp://host:port, or tls://host:port for TLS."),
    ]
    proxy_protocol: Annotated[
        bool,
        Field(
            description="Whether each connection begins with a PROXY protocol v2 header: the device's address, and its "
            "realm (0xE4), name (0xE5) and identity (0xE6)."
        ),
    ] = False
    connect_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=300,
            description="Seconds that a session waits for its connection to the service, further tries included. Ten "
            "outlast a restart of most services; then the device is told to come again.",
        ),
    ] = 10.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_tls_is_used(uses_tls=self.uses_tls, how="tls:// in url")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = parse_broker_url(self.url, _SCHEMES)
        return parts.host, parts.port

    @property
    def uses_tls(self) -> bool:
        """Whether the service is spoken to by TLS."""
        return self.url.startswith("tls://")


class TcpBackend:
    """Connects sessions to the service. While it is away, all sessions of the worker wait on one back-off."""

    def __init__(self, name: str, settings: TcpSettings) -> None:
        self.name = name
        self._settings = settings
        self._host, self._port = settings.address
        self._back_off_s = 0.0
        self._next_try_at = 0.0
        numeric = _numeric_address(self._host, self._port)
        self._is_name = numeric is None
        self._known: deque[_Address] = deque() if numeric is None else deque([numeric])
        self._known_until = 0.0 if numeric is None else math.inf
        self._attempts = Attempts(settings.connect_timeout_s)

    def towards(self, info: DeviceInfo) -> "DeviceBackend":
        """The backend as a session of this device connects to it."""
        return DeviceBackend(self, info)

    def begin(
        self,
        poller: Poller,
        protocol: asyncio.Protocol,
        info: DeviceInfo,
        done: Callable[[OSError | None], None],
    ) -> Connecting | None:
        """Try once, without a task, and call `done`. None, and nothing happens, where there is more to do: a name to
        resolve, TLS, or a back-off to wait for.
        """
        now = poller.loop.time()
        if self._settings.uses_tls or now < self._next_try_at or now >= self._known_until:
            return None
        address = self._known[0]
        self._known.rotate(-1)  # the next session has the next address, if the name has several

        def tried(error: OSError | None) -> None:
            if error is None:
                self._back_off_s = 0.0
            elif self._is_name:  # `connect` tries whatever it leads to by now
                self._known_until = 0.0
            else:
                self._failed(poller.loop.time())
            done(error)

        first = encode_header(info) if self._settings.proxy_protocol else b""
        return self._attempts.begin(poller, address, protocol, tried, first)

    async def connect(
        self, poller: Poller, protocol: asyncio.Protocol, info: DeviceInfo | None = None
    ) -> None:
        """Connect `protocol` to the service; `info` is told to it where it is asked for.

        Tries again with exponential back-off and jitter until `connect_timeout_s` has passed, then raises
        BackendUnavailable. Cancelling leaves nothing open.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._settings.connect_timeout_s
        reason = ""
        while True:
            wait_s = self._next_try_at - loop.time()
            if wait_s > 0:
                wait_s *= random.uniform(1, 1.5)  # noqa: S311 - spreads load, guards nothing
                if loop.time() + wait_s >= give_up_at:
                    break
                await asyncio.sleep(wait_s)
            try:
                async with asyncio.timeout_at(give_up_at):
                    await self._connect_once(poller, protocol, info)
            except TimeoutError:
                reason = reason or "it does not answer"
            except OSError as exc:
                reason = os_error_text(exc)
            else:
                self._back_off_s = 0.0
                return
            self._failed(loop.time())
            if loop.time() >= give_up_at:
                break
        where = address_text(self._host, self._port)
        raise BackendUnavailable(f"no connection to {where}: {reason or 'no time left'}")

    async def _connect_once(
        self, poller: Poller, protocol: asyncio.Protocol, info: DeviceInfo | None
    ) -> None:
        tls = self._settings.tls_context(self.name) if self._settings.uses_tls else None
        sock, address = await self._connect_socket(
            b"" if info is None or not self._settings.proxy_protocol else encode_header(info)
        )
        if tls is None:
            stream = Stream(poller, sock, address[0], protocol)
            stream.is_newcomer = False  # a device that has proved its key waits for it
            stream.start()
            return
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _InPieces(protocol), sock=sock, ssl=tls, server_hostname=self._host
            )
        except BaseException:
            sock.close()
            raise

    async def _connect_socket(self, header: bytes) -> tuple[socket.socket, Any]:
        """A connected socket on which the header, if any, was sent, and what it is connected to."""
        loop = asyncio.get_running_loop()
        error: OSError = ConnectionError("no address")
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        for at, (family, kind, protocol, _, address) in enumerate(found):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
                await loop.sock_connect(sock, address)
                await loop.sock_sendall(sock, header)
            except OSError as exc:
                sock.close()
                error = exc
            except BaseException:
                sock.close()
                raise
            else:
                if self._is_name:
                    # What led nowhere, as IPv6 often does, is left out; this one's turn is over.
                    others = [(each[0], each[4]) for each in found[at + 1 :] if each[0] == family]
                    self._known = deque([*others, (family, address)])
                    self._known_until = loop.time() + _KNOWN_S
                return sock, address
        raise error

    def _failed(self, now: float) -> None:
        """Wait longer before the next try, unless a failure of the same moment has seen to that already."""
        if now >= self._next_try_at:
            self._back_off_s = min(max(self._back_off_s * 2, _BACK_OFF_FIRST_S), _BACK_OFF_MAX_S)
            self._next_try_at = now + self._back_off_s


class DeviceBackend:
    """What a relay connects to: the service, told who the device is."""

    __slots__ = ("_backend", "_info")

    def __init__(self, backend: TcpBackend, info: DeviceInfo) -> None:
        self._backend = backend
        self._info = info

    def begin(
        self, poller: Poller, protocol: asyncio.Protocol, done: Callable[[OSError | None], None]
    ) -> Connecting | None:
        """As `TcpBackend.begin`."""
        return self._backend.begin(poller, protocol, self._info, done)

    async def connect(self, poller: Poller, protocol: asyncio.Protocol) -> None:
        """As `TcpBackend.connect`."""
        await self._backend.connect(poller, protocol, self._info)


class _InPieces(asyncio.BufferedProtocol):
    """Gives a protocol no more at once than a `Stream` does. The event loops' TLS would give 256 KiB, in blocks that the
    allocator takes from the kernel and gives back for each of them.
    """

    __slots__ = ("_protocol",)

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._protocol.connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._protocol.data_received(bytes(_read_buffer[:nbytes]))

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


_read_buffer = memoryview(bytearray(READ_BYTES))
"""One for all: the bytes are copied before the event loop reads again."""


def _numeric_address(host: str, port: int) -> _Address | None:
    """Family and address, where `host` is no name and has no scope."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    if "%" in host:
        return None
    return (socket.AF_INET if version == 4 else socket.AF_INET6), (host, port)  # noqa: PLR2004 - the version of IP


def encode_header(info: DeviceInfo) -> bytes:
    """The PROXY header for a device."""
    return encode_proxy_header(
        info.peer,
        info.local,
        {
            TLV_REALM: info.realm.encode(),
            TLV_DEVICE: info.device.encode(),
            TLV_IDENTITY: info.identity.encode(),
        },
    )
