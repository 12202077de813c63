"""TLS-PSK sessions without I/O: bytes in, events out; the key comes from a function that the owner gives.

A session has four verbs: `receive` and `receive_eof` for what the network brings, `send` and `close` for what the owner
wants; after any of them `output` holds what must be transmitted, also when a failure is reported, because the alert is
in there. Nothing here knows a socket, a clock, a database or a logger.

Server states: HELLO (scan the ClientHello; no SSL object yet) -> HANDSHAKE -> OPEN -> CLOSED.
Client states: HANDSHAKE -> OPEN -> CLOSED. The two directions of OPEN end on their own: `PeerClosed` says that nothing
more comes in, `close` that nothing more goes out; after both, or after `Failed`, the session is over.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from gateway.errors import PeerError
from gateway.tls.contexts import RealmContexts
from gateway.tls.openssl import ClientContext, Engine, TlsFailure, TlsVersion, Watch
from gateway.wire.client_hello import ClientHello, HelloScanner, OfferedPsk
from gateway.wire.hello_memory import HelloMemory

__all__ = [
    "ClientSession",
    "Established",
    "Event",
    "Failed",
    "PeerClosed",
    "PskChoice",
    "ServerPolicy",
    "ServerSession",
]


class PskChoice(msgspec.Struct):
    """The one identity that a handshake goes on with, and the key that its proof is checked against.

    `hash_name` is the hash that the key is bound to in TLS 1.3, `sha256` or `sha384`. An owner may derive from this
    class to remember whether the key is a device's or a decoy. Printing it does not show the key.
    """

    identity: bytes
    key: bytes
    hash_name: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}(identity={self.identity!r}, hash_name={self.hash_name!r})"


class ServerPolicy(Protocol):
    """What a server session asks its owner. Both are called at most once per handshake, never after it."""

    def contexts_for(self, hello: ClientHello) -> RealmContexts:
        """The realm's contexts, by SNI. May raise PeerError, which is answered by its alert."""

    def choose_psk(self, offered: Sequence[OfferedPsk]) -> PskChoice | None:
        """The first known of the identities offered, else a decoy for the first valid one, else None.

        In TLS 1.3 these are all identities of the hello, with their binders' lengths; in TLS 1.2 the only one, with a
        binder length of 0. A choice that does not fit the binder's hash must not be given.
        """


class Established(msgspec.Struct, frozen=True, gc=False):
    """The handshake is complete and both sides have proved the key. Names are OpenSSL's."""

    version: str
    cipher: str
    alpn: bytes


class PeerClosed(msgspec.Struct, frozen=True, gc=False):
    """The peer sent close_notify: no more bytes will come from it."""


class Failed(msgspec.Struct, frozen=True):
    """The session is over: by an error of ours, or by a `TlsFailure` of OpenSSL. `output` has the alert, if any."""

    error: PeerError | TlsFailure


Event = Established | bytes | PeerClosed | Failed
"""Decrypted bytes, never empty, stand for themselves."""

_TLS1_2 = int(TlsVersion.TLS1_2)
_PEER_CLOSED = PeerClosed()
_NOTHING: tuple[Event, ...] = ()
_FEED_BYTES = 256 * 1024
"""No more than this is given to OpenSSL at once: what one read can return."""


class _Session:
    """What both ends share once an engine is there."""

    __slots__ = ("_engine", "_open", "_over", "_sent_close")

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._open = False
        self._over = False
        self._sent_close = False

    @property
    def is_open(self) -> bool:
        """Whether the handshake is complete and nothing has ended the session."""
        return self._open and not self._over

    def send(self, data: bytes) -> None:
        """Encrypt `data` for the peer. Only while open and before `close`."""
        assert self._engine is not None
        assert self._open
        assert not self._sent_close
        if not self._over:
            self._engine.write(data)

    def close(self) -> None:
        """Queue close_notify (RFC 8446 section 6.1). What the peer still sends is received as before."""
        if self._engine is not None and self._open and not self._over and not self._sent_close:
            self._engine.shutdown()
        self._sent_close = True

    def output(self) -> bytes:
        """What must be transmitted now; empty when there is nothing."""
        return b"" if self._engine is None else self._engine.drain()

    def keep_buffers(self, *, keep: bool) -> None:
        """Keep the buffers of a session that moves much as large as they have grown; else they are made anew each time.

        It is faster by a sixth, and takes 200 KiB until it is undone.
        """
        if self._engine is None:
            return
        if keep:
            self._engine.keeps_buffers = True
        else:
            self._engine.release_buffers()

    def free(self) -> None:
        """Release the SSL object. Nothing may be called afterwards, but for `free` itself."""
        self._over = True
        if self._engine is not None:
            self._engine.free()
            self._engine = None

    def _progress(self, engine: Engine) -> Sequence[Event]:
        """Take the handshake or the data phase as far as the bytes reach."""
        events: list[Event] = []
        try:
            if not self._open:
                if not engine.handshake():
                    return _NOTHING
                self._open = True
                self._handshake_done()
                established = Established(engine.version, engine.cipher, engine.alpn)
                if not engine.has_input:
                    return (established,)
                events.append(established)
            while True:
                data = engine.read()
                if data and not (events or engine.is_more):
                    return (data,)
                if data:
                    events.append(data)
                elif data is None:
                    self._over = self._sent_close
                    events.append(_PEER_CLOSED)
                if not engine.is_more:
                    break
        except TlsFailure as failure:
            self._over = True
            events.append(Failed(failure))
        return events

    def _handshake_done(self) -> None:
        """Drop what only the handshake needed, keys first."""
        raise NotImplementedError


class ServerSession(_Session):
    """The gateway's end of one connection."""

    __slots__ = ("_alert", "_choice", "_hellos", "_policy", "_scanner", "contexts", "hello", "watch")

    def __init__(self, policy: ServerPolicy, hellos: HelloMemory | None = None) -> None:
        super().__init__()
        self._policy: ServerPolicy | None = policy
        self._hellos = hellos
        self._scanner: HelloScanner | None = None
        self._choice: PskChoice | None = None
        self._alert = b""
        self.hello: ClientHello | None = None
        self.contexts: RealmContexts | None = None
        """Of the realm that the hello asked for; None until then."""
        self.watch: Watch | None = None
        """Who traces it; to be set while the policy gives contexts, which must be watched ones then."""

    def receive(self, data: bytes) -> Sequence[Event]:
        """Take bytes from the network."""
        if self._over:
            return _NOTHING
        engine = self._engine
        if engine is None:
            return self._scan(data)
        if len(data) <= _FEED_BYTES:
            engine.feed(data)
            return self._progress(engine)
        events: list[Event] = []
        for start in range(0, len(data), _FEED_BYTES):
            events += self.receive(data[start : start + _FEED_BYTES])
        return events

    def output(self) -> bytes:
        """What must be transmitted now; empty when there is nothing."""
        if self._engine is not None:
            return self._engine.drain()
        alert, self._alert = self._alert, b""
        return alert

    def _scan(self, data: bytes) -> Sequence[Event]:
        """Wait for the whole hello, decide on it, and only then make the SSL object."""
        scanner = self._scanner
        try:
            hello = self._hellos.read(data) if scanner is None and self._hellos is not None else None
            if hello is None:
                if scanner is None:
                    scanner = self._scanner = HelloScanner()
                hello = scanner.feed(data)
                if hello is None:
                    return _NOTHING
            engine = self._decide(hello)
        except PeerError as error:
            self._over = True
            self._scanner = None
            if isinstance(error, PeerError) and error.fault.alert is not None:
                self._alert = b"\x15\x03\x01\x00\x02\x02" + bytes([error.fault.alert])
                if self.watch is not None:  # OpenSSL, which would tell of it, has not seen this connection
                    self.watch.message(sent=True, version=0x0301, content_type=0x15, data=self._alert[-2:])
            return (Failed(error),)
        self._engine = engine
        if self.watch is not None:
            engine.watch(self.watch)
        engine.feed(data if scanner is None else scanner.received)
        self._scanner = None
        return self._progress(engine)

    def _decide(self, hello: ClientHello) -> Engine:
        """Choose version, PSK and so the context.

        TLS 1.3 is taken when the hello offers it together with an identity that can be chosen, for psk_dhe_ke, the only
        mode of any profile; else TLS 1.2, if the hello allows that (GnuTLS with `NORMAL:+PSK` offers psk_ke alone, and
        PSK suites of TLS 1.2). What offers only TLS 1.3 and nothing of that is left to fail in OpenSSL.
        """
        assert self._policy is not None
        self.hello = hello
        self.contexts = contexts = self._policy.contexts_for(hello)
        if hello.offers_tls13:
            is_tls13_alone = _TLS1_2 not in hello.versions
            if hello.psks and (hello.offers_psk_dhe_ke or is_tls13_alone):
                self._choice = self._policy.choose_psk(hello.psks)
            if self._choice is not None:
                return contexts.tls13(self._choice.hash_name).engine(self._chosen_key)
            if is_tls13_alone:
                return contexts.tls13("sha256").engine(self._chosen_key)
        return contexts.tls12_for(hello.signatures).engine(self._key_of)

    def _chosen_key(self, identity: bytes) -> tuple[bytes, str] | None:
        """TLS 1.3: only the chosen identity, byte for byte, has a key; asked again after a HelloRetryRequest."""
        choice = self._choice
        if choice is None or choice.identity != identity:
            return None
        return choice.key, choice.hash_name

    def _key_of(self, identity: bytes) -> tuple[bytes, str] | None:
        """TLS 1.2: the identity comes with the ClientKeyExchange, in the middle of the handshake."""
        assert self._policy is not None
        self._choice = choice = self._policy.choose_psk((OfferedPsk(identity, 0),))
        if choice is None or choice.identity != identity:
            return None
        return choice.key, choice.hash_name

    def _handshake_done(self) -> None:
        self._choice = None
        self._policy = None
        assert self._engine is not None
        self._engine.find_key = None


ClientKeys = Callable[[bytes | None], tuple[bytes, bytes, str] | None]
"""hint, or None for none -> (identity, key, hash name), or None to give up (RFC 4279 section 5.2)."""


class ClientSession(_Session):
    """A device's end: the same engine the other way round. The first `output` is the ClientHello."""

    __slots__ = ()

    def __init__(self, context: ClientContext, keys: ClientKeys, server_name: str | None = None) -> None:
        super().__init__()
        self._engine = context.engine(keys, server_name)
        try:
            self._engine.handshake()
        except BaseException:  # nobody gets the session, so nobody else can free it
            self.free()
            raise

    def receive(self, data: bytes) -> Sequence[Event]:
        """Take bytes from the network."""
        if self._over or self._engine is None:
            return _NOTHING
        events: list[Event] = []
        for start in range(0, len(data), _FEED_BYTES):
            self._engine.feed(data[start : start + _FEED_BYTES])
            events += self._progress(self._engine)
        return events

    def _handshake_done(self) -> None:
        pass  # the keys are the device's own; it keeps them for the next connection
