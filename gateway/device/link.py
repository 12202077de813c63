"""One TLS-PSK connection of a device: the thin file that drives a socket and a client session.

Theory of operation
-------------------
The event loop reads into one buffer of the process, the session decrypts it, the owner gets what
is in it, and whatever that wants to send is flushed once, at the end. There is no task per link: `Dialer.connect` waits
for the handshake, after it the owner's methods are called by the event loop.

Each direction ends on its own. `finish` says close_notify and goes on receiving; `link_finished` tells that the gateway
did the same. `link_lost` is called exactly once, last, for every link that was opened. A connection that ends without
close_notify was cut: that is always an error, since bytes may be missing (RFC 8446 section 6.1).
"""

import asyncio
import dataclasses
import functools
import socket
from typing import Final, Protocol, cast

from gateway.device.keyring import KeyRing
from gateway.errors import DeviceError, DeviceRefused
from gateway.net.address import address_text
from gateway.tls.openssl import ClientContext, TlsFailure, TlsVersion, Trace
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import ClientSession, Established, Event, Failed

__all__ = ["CONNECT_TIMEOUT_S", "READ_BYTES", "Dialer", "Link", "LinkOwner"]

CONNECT_TIMEOUT_S: Final = 10.0
SEND_BUFFER_BYTES: Final = 64 * 1024
"""What may wait for the gateway before the owner is told to pause."""
LINGER_S: Final = 2.0
"""How long a closed link waits for the gateway to take its last bytes."""

READ_BYTES: Final = 64 * 1024
"""One read of the event loop. Four times as much makes blocks that the allocator takes from the kernel and gives back at
every turn: up to ten times the CPU time per byte, in page faults."""
_read_buffer = memoryview(bytearray(READ_BYTES))
"""One for all links of the process: the bytes are decrypted before the event loop reads again."""


class LinkOwner(Protocol):
    """What a link tells its owner. None of these waits."""

    def link_opened(self, link: "Link") -> None:
        """Both sides have proved the key."""

    def link_received(self, data: bytes) -> None:
        """Decrypted bytes, never empty."""

    def link_finished(self) -> None:
        """The gateway said close_notify: nothing more comes from it. It may still listen."""

    def link_lost(self, error: DeviceError | None) -> None:
        """The connection is gone; None when it ended in an orderly way. Called exactly once, last."""

    def pause_sending(self) -> None:
        """The gateway reads slowly: send little until `resume_sending`."""

    def resume_sending(self) -> None:
        """It reads again."""


@dataclasses.dataclass(frozen=True)
class Dialer:
    """Where a gateway is and how to prove oneself to it: opens any number of links, all on one TLS context.

    `server_name` goes into SNI, which may choose the realm. `timeout_s` is for name, connection and handshake together.
    `trace` sees every handshake message, see `gateway.tls.openssl.Trace`.
    """

    host: str
    port: int
    ring: KeyRing
    server_name: str | None = None
    timeout_s: float = CONNECT_TIMEOUT_S
    lowest: TlsVersion = TlsVersion.TLS1_2
    highest: TlsVersion = TlsVersion.TLS1_3
    trace: Trace | None = None

    @property
    def where(self) -> str:
        """The gateway's address as people write it."""
        return address_text(self.host, self.port)

    @functools.cached_property
    def context(self) -> ClientContext:
        """Made at the first use: the suites of `compatible`, and in TLS 1.3 those of the default key's hash."""
        return ClientContext(
            PROFILES[ProfileName.COMPATIBLE].tls12_suites,
            TLS13_SUITES[self.ring.default.hash_name],
            lowest=self.lowest,
            highest=self.highest,
            trace=self.trace,
        )

    async def connect(self, owner: LinkOwner, ring: KeyRing | None = None) -> "Link":
        """Connect and prove the key. Raises DeviceRefused or DeviceError that says what went wrong and what to do.

        `ring` is for one who has many devices to connect on one context. Cancelling leaves nothing open.
        """
        loop = asyncio.get_running_loop()
        link = Link(self, ring or self.ring, owner, loop)
        try:
            async with asyncio.timeout(self.timeout_s):
                await loop.create_connection(lambda: link, self.host, self.port)
                await link.opened
        except TimeoutError:
            link.abort()
            raise DeviceError(
                f"{self.where} did not answer within {self.timeout_s:g} s: is that a gateway?"
            ) from None
        except socket.gaierror as exc:
            raise DeviceError(f"{self.host} cannot be found ({exc.strerror}): check the name") from exc
        except OSError as exc:
            raise DeviceError(
                f"cannot connect to {self.where}: {exc.strerror or exc}: is the gateway running there?"
            ) from exc
        except BaseException:
            link.abort()
            raise
        return link


class Link(asyncio.BufferedProtocol):
    """A connection that `Dialer.connect` opened."""

    __slots__ = (
        "_alive", "_dialer", "_error", "_finished", "_linger", "_loop", "_owner", "_peer_finished", "_reading", "_ring", "_session", "_transport",
        "cipher", "hint", "identity", "opened", "version",
    )  # fmt: skip

    def __init__(
        self, dialer: Dialer, ring: KeyRing, owner: LinkOwner, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._dialer = dialer
        self._ring = ring
        self._owner = owner
        self._session: ClientSession | None = None
        self._transport: asyncio.Transport | None = None
        self._error: DeviceError | None = None
        self._loop = loop
        self._linger: asyncio.TimerHandle | None = None
        self._alive = False
        self._reading = True
        self._finished = False
        self._peer_finished = False
        self.opened: asyncio.Future[None] = loop.create_future()
        self.identity = ""
        """The identity that was offered."""
        self.hint: str | None = None
        """The identity hint that the gateway sent; TLS 1.3 has none."""
        self.version = ""
        self.cipher = ""

    # For the owner

    @property
    def is_open(self) -> bool:
        """Whether `send` still reaches the gateway."""
        return self._alive and not self._finished

    @property
    def waiting_bytes(self) -> int:
        """Encrypted bytes that the socket did not take yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, data: bytes) -> None:
        """Encrypt and transmit. Nothing happens after `finish` or when the link is gone."""
        if not self.is_open:
            return
        assert self._session is not None
        self._session.send(data)
        self._flush()

    def finish(self) -> None:
        """Say close_notify: nothing more will be sent. Receiving goes on."""
        if not self.is_open:
            return
        assert self._session is not None
        self._finished = True
        self._session.close()
        self._flush()
        if self._peer_finished:
            self._close()

    def close(self) -> None:
        """Say close_notify and be gone; what the gateway still sends is dropped."""
        self.finish()
        self._peer_finished = True
        self._close()
        if self.waiting_bytes and self._linger is None:  # for one who does not read
            self._linger = self._loop.call_later(LINGER_S, self.abort)

    def abort(self) -> None:
        """Be gone without a word."""
        self._peer_finished = True
        if self._transport is not None:
            self._transport.abort()

    def pause_receiving(self) -> None:
        """Do not read the gateway until `resume_receiving`."""
        if self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume_receiving(self) -> None:
        """Read it again."""
        if not self._reading and self._transport is not None:
            self._reading = True
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # From the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES)
        _keep_alive(transport)
        if self.opened.done():  # given up meanwhile
            transport.abort()
            return
        self._session = ClientSession(self._dialer.context, self._choose_key, self._dialer.server_name)
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Where the gateway's bytes go."""
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what the gateway sent."""
        if self._session is None or self._error is not None:
            return
        try:
            events = self._session.receive(bytes(_read_buffer[:nbytes]))
        except DeviceError as refused:  # by the key ring
            self._fail(refused)
            return
        for event in events:
            self._handle(event)
        self._flush()

    def eof_received(self) -> bool:
        """The gateway's FIN: nothing that is sent now would be read."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        error = self._error
        if error is None and not self._peer_finished:
            where = self._dialer.where
            if exc is None:
                error = self._cut()
            elif self._alive:
                error = DeviceError(f"the connection to {where} broke: {exc}")
            else:
                error = DeviceError(
                    f"the connection broke in the handshake ({exc}): is {where} a TLS-PSK listener?"
                )
        if self._linger is not None:
            self._linger.cancel()
        self._transport = None
        if self._session is not None:
            self._session.free()
            self._session = None
        if not self.opened.done():
            self.opened.set_exception(error or self._cut())
        elif self._alive:
            self._alive = False
            self._owner.link_lost(error)

    def pause_writing(self) -> None:
        """The gateway reads slowly."""
        if self._alive:
            self._owner.pause_sending()

    def resume_writing(self) -> None:
        """It reads again."""
        if self._alive:
            self._owner.resume_sending()

    # Inside

    def _choose_key(self, hint: bytes | None) -> tuple[bytes, bytes, str]:
        if hint is not None:
            self.hint = hint.decode("utf-8", "replace")
        chosen = self._ring.key_for(self.hint)
        self.identity = chosen.identity
        return chosen.identity.encode("utf-8"), chosen.key.reveal(), chosen.hash_name

    def _handle(self, event: Event) -> None:
        if type(event) is bytes:
            if self._alive:
                self._owner.link_received(event)
        elif type(event) is Established:
            self.version, self.cipher = event.version, event.cipher
            self._alive = True
            if self.opened.done():  # given up in this very moment
                self.abort()
            else:
                self.opened.set_result(None)
                self._owner.link_opened(self)
        elif type(event) is Failed:
            self._fail(self._explain(event))
        elif not self._peer_finished:
            self._peer_finished = True
            self._owner.link_finished()
            if self._finished:
                self._close()

    def _fail(self, error: DeviceError) -> None:
        """Say the alert, if there is one, and be gone."""
        self._error = error
        self._flush()
        self._close()

    def _flush(self) -> None:
        if self._session is None or self._transport is None:
            return
        output = self._session.output()
        if output:
            self._transport.write(output)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _cut(self) -> DeviceError:
        if not self._alive:
            return DeviceError(
                f"{self._dialer.where} closed the connection during the handshake: is it a TLS-PSK listener? "
                "If it is, its log says why"
            )
        return DeviceError(f"{self._dialer.where} cut the connection: what was under way may be lost")

    def _explain(self, failed: Failed) -> DeviceError:
        """What a failed handshake or session means to a user."""
        where, error = self._dialer.where, failed.error
        if not isinstance(error, TlsFailure):
            return DeviceError(str(error))
        if self._alive:
            return DeviceError(f"{where} ended the connection by an error: {error}")
        if error.reason == _CERTIFICATE_VERIFY_FAILED:
            return DeviceRefused(
                f"{where} shows a certificate and proves no key: it is no TLS-PSK listener, check host and port"
            )
        if error.alert_received in _UNPROVED:
            return DeviceRefused(
                f"{where} refused the identity or the key: check both; its log says which it was{self._offered()}"
            )
        return DeviceRefused(f"{where} {_refusal(error)}")

    def _offered(self) -> str:
        """A remark for a ring that had to guess."""
        if len(self._ring.keys) == 1 or self.hint is not None:
            return ""
        return (
            f" (there was no hint, so the default key of the ring was offered, {self.identity}: where a hint chooses, "
            "allow TLS 1.2 only)"
        )


def _refusal(error: TlsFailure) -> str:
    alert = error.alert_received
    if alert is None:
        return f"speaks no TLS that this client knows ({error}): this is not a TLS-PSK server, check host and port"
    return _ALERTS.get(alert, f"ended the handshake ({error}): its log says why")


def _keep_alive(transport: asyncio.Transport) -> None:
    """Notice within two minutes that a silent gateway lost its power: nothing else would tell."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


_CERTIFICATE_VERIFY_FAILED: Final = 134
_UNPROVED: Final = frozenset({20, 51, 115})
"""bad_record_mac, decrypt_error, unknown_psk_identity: what a server says to a wrong or unknown key."""
_ALERTS: Final = {
    40: "finds nothing in common: it serves certificates only, or allows none of the PSK suites; see its log",
    70: "speaks none of the TLS versions offered: TLS 1.2 and 1.3 are",
    71: "wants stronger suites than those offered: see the profile of its listener",
    112: "does not know the server name: check what was asked for by SNI",
}  # handshake_failure, protocol_version, insufficient_security, unrecognized_name
