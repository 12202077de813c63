"""A device that a test drives by hand: blocking, over the client session of the gateway's own TLS."""

import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

from gateway.config import load
from gateway.registry.ledger import Author
from gateway.registry.store import NewDevice, Registry
from gateway.tls.openssl import ClientContext
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import ClientSession, Established, Failed, PeerClosed
from tests.support.gateway import Device, Gateway, wait_for

__all__ = ["RawDevice", "add_devices"]

TIMEOUT_S = 10.0


class RawDevice:
    """One connection, established. Every wait ends after `TIMEOUT_S` with an OSError."""

    def __init__(self, port: int, device: Device, *, receive_buffer: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(("127.0.0.1", port))
        key = bytes.fromhex(device.key)
        context = ClientContext(PROFILES[ProfileName.COMPATIBLE].tls12_suites, TLS13_SUITES["sha256"])
        self._session = ClientSession(context, lambda _hint: (device.identity.encode(), key, "sha256"))
        self._received = bytearray()
        self._established = self._ended = False
        self._flush()
        while not self._established:
            self._read()
            assert not self._ended, "the gateway closed the connection in the handshake"

    def send(self, data: bytes) -> None:
        """Encrypt and transmit."""
        self._session.send(data)
        self._flush()

    def receive(self) -> bytes:
        """The next bytes, `b""` at the end."""
        while not self._received and not self._ended:
            self._read()
        data = bytes(self._received)
        self._received.clear()
        return data

    def receive_exactly(self, size: int) -> bytes:
        """As many bytes; what follows stays."""
        while len(self._received) < size:
            assert not self._ended, f"the gateway closed after {bytes(self._received)!r}"
            self._read()
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def receive_until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        while mark not in self._received:
            assert not self._ended, f"the gateway closed after {bytes(self._received)!r}"
            self._read()
        return self.receive_exactly(self._received.index(mark) + len(mark))

    def receive_line(self) -> bytes:
        """One line, without its end."""
        return self.receive_until(b"\n")[:-1]

    def is_closed(self) -> bool:
        """Whether the gateway has ended its side; does not wait."""
        self._socket.settimeout(0.001)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            self._read()
        self._socket.settimeout(TIMEOUT_S)
        return self._ended

    def finish(self) -> None:
        """Say close_notify, and go on receiving."""
        self._session.close()
        self._flush()

    def wait_for_bytes(self, count: int) -> None:
        """Wait until so many bytes of the wire have come, and leave them unread: more than what follows a handshake."""
        wait_for(
            lambda: len(self._socket.recv(count, socket.MSG_PEEK)) >= count, TIMEOUT_S, "bytes on the wire"
        )

    def abort(self) -> None:
        """Be gone by a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._session.free()

    def _read(self) -> None:
        data = self._socket.recv(65_536)
        if not data:
            self._ended = True
            return
        for event in self._session.receive(data):
            match event:
                case Established():
                    self._established = True
                case bytes():
                    self._received += event
                case PeerClosed():
                    self._ended = True
                case Failed():
                    raise ConnectionError(str(event.error))
        self._flush()

    def _flush(self) -> None:
        output = self._session.output()
        if output:
            self._socket.sendall(output)


def add_devices(gateway: Gateway, groups: dict[str, str | None]) -> dict[str, Device]:
    """Devices by name, each in its group; in one process, where `gatewayctl add-device` would start one for each."""
    with Registry(load(gateway.config).registry, Author("tests", "localhost")) as registry:
        added = [registry.add_device(NewDevice(identity=name, group=group)) for name, group in groups.items()]
    return {each.identity: Device(each.identity, each.key.hex()) for each in added}
