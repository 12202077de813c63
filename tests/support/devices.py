"""Devices for tests: one on a blocking socket that can be steered to the byte, and a fleet of many in one process."""

import asyncio
import enum
import functools
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Self

from gateway.device.client import DeviceClient
from gateway.registry.sealing import Key
from gateway.tls.openssl import ClientContext, TlsFailure, TlsVersion
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import ClientSession, Established, Event, Failed, PeerClosed
from tests.support.gateway import Device

__all__ = ["TLS12", "TLS13", "End", "Fleet", "Refused", "TlsDevice", "reset"]

TLS12, TLS13 = TlsVersion.TLS1_2, TlsVersion.TLS1_3
DEADLINE_S = 20.0
_tls = threading.Lock()
"""TLS sessions of one process share buffers: devices on several threads take turns."""
READ_BYTES = 256 * 1024


class End(enum.Enum):
    """How a connection ended, as the device saw it."""

    NOTIFIED = "close_notify"
    ALERT = "a fatal alert"
    CUT = "FIN without close_notify"
    RESET = "reset"


class Refused(Exception):
    """The handshake did not succeed."""

    def __init__(self, end: End | None, alert: int | None) -> None:
        super().__init__(end, alert)
        self.end = end
        self.alert = alert


@functools.cache
def client_context(
    version: TlsVersion | None = None, suites: tuple[str, ...] = (), alpn: tuple[bytes, ...] = ()
) -> ClientContext:
    """A client's context; without a version it offers 1.3 and 1.2, without suites what the gateway's own client does."""
    tls12 = suites or PROFILES[ProfileName.COMPATIBLE].tls12_suites
    if version is TLS12:
        return ClientContext(tls12, (), highest=TLS12, alpn=alpn)
    if version is TLS13:
        return ClientContext((), suites or TLS13_SUITES["sha256"], lowest=TLS13, alpn=alpn)
    return ClientContext(tls12, TLS13_SUITES["sha256"], alpn=alpn)


class TlsDevice:
    """One device. Every wait ends with TimeoutError after `timeout_s`.

    `connect` gives one whose handshake is done; the constructor only connects by TCP, so that a test can go through
    the handshake by flights: `flight` is what TLS wants to send now.
    """

    def __init__(
        self,
        port: int,
        device: Device,
        *,
        version: TlsVersion | None = None,
        suites: Sequence[str] = (),
        address: str = "",
        receive_buffer_bytes: int = 0,
        timeout_s: float = DEADLINE_S,
        host: str = "127.0.0.1",
    ) -> None:
        self.sock = tcp_socket(port, address, receive_buffer_bytes, timeout_s, host)
        identity, key = device.identity.encode(), bytes.fromhex(device.key)
        with _tls:
            self.session = ClientSession(
                client_context(version, tuple(suites)), lambda _hint: (identity, key, "sha256")
            )
        self.version = ""
        self.end: End | None = None
        self.alert: int | None = None
        self._received: list[bytes] = []

    @classmethod
    def connect(cls, port: int, device: Device, **settings: object) -> Self:
        """Connect and prove the key. Raises Refused."""
        self = cls(port, device, **settings)  # type: ignore[arg-type]  # as the constructor has them
        try:
            self.handshake()
        except BaseException:
            self.close()
            raise
        return self

    def handshake(self) -> None:
        """The rest of the handshake. Raises Refused."""
        self.transmit()
        while not self.version:
            if self.end is not None:
                raise Refused(self.end, self.alert)
            self._read()

    def flight(self) -> bytes:
        """What TLS wants to send now; the caller transmits it, or a part of it."""
        with _tls:
            return self.session.output()

    def transmit(self) -> None:
        """Send what TLS wants to send."""
        if output := self.flight():
            self.sock.sendall(output)

    def take(self) -> None:
        """Let TLS take what the next read brings, and send nothing."""
        self._take(self.sock.recv(READ_BYTES))

    def send(self, data: bytes) -> None:
        """Send bytes, all of them."""
        with _tls:
            self.session.send(data)
            output = self.session.output()
        self.sock.sendall(output)

    def receive(self) -> bytes:
        """The next bytes, empty at the end: `end` then says which one."""
        while not self._received and self.end is None:
            self._read()
        data = b"".join(self._received)
        self._received.clear()
        return data

    def receive_exactly(self, size: int) -> bytes:
        """So many bytes; what came with them is kept. Fails at an early end."""
        data = b""
        while len(data) < size:
            more = self.receive()
            assert more, f"the connection ended ({self.end}) after {len(data)} bytes of {size}"
            data += more
        if data[size:]:
            self._received.insert(0, data[size:])
        return data[:size]

    def receive_line(self) -> str:
        """The next line without its end; "" when the gateway has ended."""
        data = b""
        while b"\n" not in data:
            more = self.receive()
            if not more:
                assert not data, data
                return ""
            data += more
        line, _, rest = data.partition(b"\n")
        if rest:
            self._received.insert(0, rest)
        return line.decode()

    def receive_lines(self, count: int) -> list[str]:
        """So many lines."""
        return [self.receive_line() for _ in range(count)]

    def receive_to_end(self) -> bytes:
        """Everything until the gateway ends its side."""
        pieces = []
        while data := self.receive():
            pieces.append(data)
        return b"".join(pieces)

    def echo(self, data: bytes) -> None:
        """Send bytes through a service that echoes, and compare what comes back."""
        self.send(data)
        assert self.receive_exactly(len(data)) == data

    def finish(self) -> None:
        """Say close_notify. Receiving goes on."""
        with _tls:
            self.session.close()
        self.transmit()

    def reset(self) -> None:
        """End the connection with a reset."""
        reset(self.sock)
        with _tls:
            self.session.free()

    def close(self) -> None:
        """Close the socket and say nothing."""
        self.sock.close()
        with _tls:
            self.session.free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(self) -> None:
        """Take one read, and answer what TLS has to answer."""
        try:
            data = self.sock.recv(READ_BYTES)
        except ConnectionError:
            self.end = End.RESET
            return
        if data:
            self._take(data)
            self.transmit_if_possible()
        else:
            self.end = End.CUT

    def transmit_if_possible(self) -> None:
        """Send an alert, a key update or the like; a peer that is gone will not miss it."""
        try:
            self.transmit()
        except ConnectionError:
            self.end = self.end or End.RESET

    def _take(self, data: bytes) -> None:
        with _tls:
            events = self.session.receive(data)
        for event in events:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case Established():
                self.version = event.version
            case bytes():
                self._received.append(event)
            case PeerClosed():
                self.end = End.NOTIFIED
            case Failed():
                self.end = End.ALERT
                self.alert = event.error.alert_received if isinstance(event.error, TlsFailure) else None


def tcp_socket(
    port: int,
    address: str = "",
    receive_buffer_bytes: int = 0,
    timeout_s: float = DEADLINE_S,
    host: str = "127.0.0.1",
) -> socket.socket:
    """A connected socket, from `address` if given."""
    sock = socket.socket()
    try:
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        if address:
            sock.bind((address, 0))
        sock.settimeout(timeout_s)
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def reset(sock: socket.socket) -> None:
    """Close a socket with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Fleet:
    """Many devices on one event loop, each with the gateway's own client."""

    def __init__(self, port: int, devices: Iterable[Device], *, connecting_max: int = 64) -> None:
        self._port = port
        self._devices = tuple(devices)
        self._connecting = asyncio.Semaphore(connecting_max)
        self.clients: list[DeviceClient] = []

    async def connect(self) -> None:
        """Connect them all."""
        async with asyncio.TaskGroup() as tasks:
            connecting = [tasks.create_task(self.connect_one(device)) for device in self._devices]
        self.clients = [task.result() for task in connecting]

    async def connect_one(self, device: Device) -> DeviceClient:
        """Connect one more, which the caller closes."""
        async with self._connecting:
            key = Key(bytes.fromhex(device.key))
            return await DeviceClient.connect(
                "127.0.0.1", self._port, device.identity, key, timeout_s=DEADLINE_S
            )

    async def each(self, action: Callable[[int, DeviceClient], Awaitable[None]]) -> None:
        """Do something with every device at the same time."""

        async def act(number: int, client: DeviceClient) -> None:
            await action(number, client)

        async with asyncio.TaskGroup() as tasks:
            for number, client in enumerate(self.clients):
                tasks.create_task(act(number, client))

    async def close(self) -> None:
        """Close them all."""
        async with asyncio.TaskGroup() as tasks:
            for client in self.clients:
                tasks.create_task(client.close())
