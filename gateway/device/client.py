r"""A device's client: one TLS-PSK connection to a gateway, on asyncio streams.

client = await DeviceClient.connect("127.0.0.1", 8883, "meter-7", key)
await client.send(b"21.5\n")
print(await client.receive())
await client.close()
"""

import asyncio
import contextlib
from typing import Final, Self

from gateway.errors import DeviceError
from gateway.registry.sealing import Key
from gateway.tls.openssl import ClientContext, TlsFailure
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import ClientSession, Data, Established, Event, Failed, PeerClosed

__all__ = ["CONNECT_TIMEOUT_S", "DeviceClient"]

CONNECT_TIMEOUT_S: Final = 10.0
_READ_BYTES: Final = 64 * 1024
_UNPROVED_ALERTS: Final = frozenset({20, 51, 115})
"""bad_record_mac, decrypt_error, unknown_psk_identity: what a server says to a wrong or unknown key."""


class DeviceClient:
    """An established connection. One task may send while another receives."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: ClientSession
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._session = session
        self._received: list[bytes] = []
        self._ended = False
        self.hint: str | None = None
        """The identity hint that the server sent; TLS 1.3 has none."""
        self.version = ""
        self.cipher = ""

    @classmethod
    async def connect(
        cls,
        host: str,
        port: int,
        identity: str,
        key: Key,
        *,
        server_name: str | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Self:
        """Connect and prove the key. Raises DeviceError that says what went wrong and what to do."""
        try:
            async with asyncio.timeout(timeout_s):
                return await cls._connect(host, port, identity.encode("utf-8"), key, server_name)
        except TimeoutError:
            raise DeviceError(
                f"{host}:{port} did not answer within {timeout_s:g} s: is that a gateway?"
            ) from None
        except OSError as exc:
            raise DeviceError(
                f"cannot connect to {host}:{port}: {exc.strerror or exc}: is the gateway running there?"
            ) from exc

    @classmethod
    async def _connect(cls, host: str, port: int, identity: bytes, key: Key, server_name: str | None) -> Self:
        reader, writer = await asyncio.open_connection(host, port)
        hints: list[bytes] = []

        def keys(hint: bytes | None) -> tuple[bytes, bytes, str]:
            if hint is not None:
                hints.append(hint)
            return identity, key.reveal(), "sha256"

        context = ClientContext(PROFILES[ProfileName.COMPATIBLE].tls12_suites, TLS13_SUITES["sha256"])
        client = cls(reader, writer, ClientSession(context, keys, server_name))
        try:
            await client._flush()
            while not client.version and not client._ended:
                await client._read()
        except BaseException:
            writer.transport.abort()
            raise
        if not client.version:
            raise DeviceError(
                f"{host}:{port} closed the connection during the handshake: see the gateway's log"
            )
        client.hint = hints[-1].decode("utf-8", "replace") if hints else None
        return client

    async def send(self, data: bytes) -> None:
        """Send bytes. Raises DeviceError when the connection is gone."""
        if self._ended:
            raise DeviceError("the gateway has closed the connection")
        self._session.send(data)
        await self._flush()

    async def receive(self) -> bytes:
        """The next bytes from the gateway, `b""` when it has ended its side. Raises DeviceError on failure."""
        while not self._received and not self._ended:
            await self._read()
        data = b"".join(self._received)
        self._received.clear()
        return data

    async def finish(self) -> None:
        """Say close_notify: nothing more will be sent. Receiving goes on."""
        self._session.close()
        await self._flush()

    async def close(self) -> None:
        """End the connection in an orderly way, and at once."""
        if not self._ended:
            self._session.close()
        with contextlib.suppress(DeviceError):
            await self._flush()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        self._session.free()

    async def _read(self) -> None:
        try:
            data = await self._reader.read(_READ_BYTES)
        except OSError as exc:
            raise DeviceError(f"the connection broke: {exc.strerror or exc}") from exc
        if not data:
            self._ended = True
            return
        for event in self._session.receive(data):
            self._handle(event)
        await self._flush()

    def _handle(self, event: Event) -> None:
        match event:
            case Established():
                self.version, self.cipher = event.version, event.cipher
            case Data():
                self._received.append(event.data)
            case PeerClosed():
                self._ended = True
            case Failed():
                self._ended = True
                raise DeviceError(_explain(event))

    async def _flush(self) -> None:
        output = self._session.output()
        if output:
            self._writer.write(output)
        try:
            await self._writer.drain()
        except OSError as exc:
            raise DeviceError(f"the connection broke: {exc.strerror or exc}") from exc


def _explain(failed: Failed) -> str:
    error = failed.error
    if isinstance(error, TlsFailure) and error.alert_received in _UNPROVED_ALERTS:
        return "the gateway refused the identity or the key: check both; its log says which it was"
    if isinstance(error, TlsFailure) and error.alert_received is not None:
        return f"the gateway ended the handshake ({error}): its log says why"
    return f"this is not a TLS-PSK server, or it speaks another TLS: {error}"
