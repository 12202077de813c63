"""Bytes over one link, awaited: for `gatewayctl connect`, and for protocols of one's own on a stream route."""

import asyncio
import contextlib
from typing import Final, Self

from gateway.device.keyring import KeyRing
from gateway.device.link import CONNECT_TIMEOUT_S, Dialer, Link
from gateway.errors import DeviceError
from gateway.registry.sealing import Key

__all__ = ["DeviceClient"]

RECEIVED_BYTES_MAX: Final = 1024 * 1024
"""What may wait for `receive` before the gateway is not read any more."""


class DeviceClient:
    """An established connection. One task may send while another receives. Made by `connect` or `dial`."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._received: list[bytes] = []
        self._received_bytes = 0
        self._over = False
        self._error: DeviceError | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._gone = asyncio.Event()
        self._writable.set()

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
        return await cls.dial(Dialer(host, port, KeyRing.of(identity, key), server_name, timeout_s))

    @classmethod
    async def dial(cls, dialer: Dialer) -> Self:
        """The same, with all that a Dialer can be told."""
        client = cls()
        await dialer.connect(client)
        return client

    @property
    def hint(self) -> str | None:
        """The identity hint that the gateway sent; TLS 1.3 has none."""
        return self._opened.hint

    @property
    def identity(self) -> str:
        """The identity that was offered."""
        return self._opened.identity

    @property
    def version(self) -> str:
        """`TLSv1.2` or `TLSv1.3`."""
        return self._opened.version

    @property
    def cipher(self) -> str:
        """The suite by OpenSSL's name."""
        return self._opened.cipher

    async def send(self, data: bytes) -> None:
        """Send bytes; waits while the gateway does not read. Raises DeviceError when the connection is gone."""
        self._check()
        if not self._opened.is_open:
            raise DeviceError("the gateway has closed the connection")
        self._opened.send(data)
        await self._writable.wait()
        self._check()

    async def receive(self) -> bytes:
        """The next bytes from the gateway, `b""` when it has ended its side. Raises DeviceError on failure."""
        while not self._received and not self._over:
            self._readable.clear()
            await self._readable.wait()
        if not self._received:
            self._check()
        data = b"".join(self._received)
        self._received.clear()
        self._received_bytes = 0
        self._opened.resume_receiving()
        return data

    async def finish(self) -> None:
        """Say close_notify: nothing more will be sent. Receiving goes on."""
        self._opened.finish()

    async def close(self) -> None:
        """End the connection in an orderly way, and at once."""
        self._opened.close()
        with contextlib.suppress(DeviceError):
            await self._gone.wait()

    # From the link

    def link_opened(self, link: Link) -> None:
        """The handshake is done."""
        self._link = link

    def link_received(self, data: bytes) -> None:
        """Keep bytes for `receive`."""
        self._received.append(data)
        self._received_bytes += len(data)
        if self._received_bytes > RECEIVED_BYTES_MAX:
            self._opened.pause_receiving()
        self._readable.set()

    def link_finished(self) -> None:
        """The end of what `receive` gives."""
        self._over = True
        self._readable.set()

    def link_lost(self, error: DeviceError | None) -> None:
        """Wake all who wait."""
        self._error = error
        self._over = True
        self._readable.set()
        self._writable.set()
        self._gone.set()

    def pause_sending(self) -> None:
        """The gateway does not read."""
        self._writable.clear()

    def resume_sending(self) -> None:
        """It reads again."""
        self._writable.set()

    @property
    def _opened(self) -> Link:
        assert self._link is not None
        return self._link

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
