"""The binding: the only module that names OpenSSL's `lib` and `ffi`.

Theory of operation
-------------------
pyOpenSSL makes the contexts; its maintainers keep the PSK symbols in the `cryptography` binding so that a context can be
extended, which is what happens here. `Engine` is one SSL object between two memory BIOs. It is a pump with no policy:
`feed` bytes from the network, `handshake` or `read`, then `drain` what must go to the network, also after an error,
because the alert is in there.

OpenSSL asks for keys by C callbacks that know only the `SSL *`. An engine stands in `_handshaking` under that address
exactly while its `SSL_do_handshake` runs, so a callback finds its engine and an engine that is gone cannot be found.
A callback never raises into C: an exception is kept and raised again by the pump that called OpenSSL.

Server contexts speak one version each (see `contexts`), so each has one PSK callback only:
TLS 1.2 the server callback, which sees the identity as a C string, cut at a NUL (which no valid identity holds);
TLS 1.3 the find-session callback, which sees every offered identity with its length. That one answers "not known" for
all but the identity that was chosen from the ClientHello, byte for byte; OpenSSL calls it again after a
HelloRetryRequest, and the same rule then keeps out identities that the first hello did not offer.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, Final

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

from gateway.errors import ConfigurationError

__all__ = [
    "RECORD_BYTES",
    "ClientContext",
    "Engine",
    "ServerContext",
    "TlsFailure",
    "TlsVersion",
    "library_version",
]

_binding = Binding()
_lib: Final[Any] = _binding.lib
_ffi: Final[Any] = _binding.ffi

_SYMBOLS: Final = (
    "BIO_free",
    "BIO_new",
    "BIO_new_mem_buf",
    "BIO_read",
    "BIO_s_mem",
    "BIO_write",
    "Cryptography_SSL_SESSION_new",
    "DH_free",
    "PEM_read_bio_DHparams",
    "SSL_CIPHER_find",
    "SSL_CIPHER_get_name",
    "SSL_CTX_set1_curves_list",
    "SSL_CTX_set_alpn_select_cb",
    "SSL_CTX_set_msg_callback",
    "SSL_CTX_set_psk_client_callback",
    "SSL_CTX_set_psk_find_session_callback",
    "SSL_CTX_set_psk_server_callback",
    "SSL_CTX_set_psk_use_session_callback",
    "SSL_CTX_use_psk_identity_hint",
    "SSL_SESSION_set1_master_key",
    "SSL_SESSION_set_cipher",
    "SSL_SESSION_set_protocol_version",
    "SSL_set_bio",
)

_missing = [name for name in _SYMBOLS if not hasattr(_lib, name)]
if _missing:
    raise ConfigurationError(
        f"the installed `cryptography` lacks {', '.join(_missing)}: install a release whose OpenSSL has PSK"
    )

RECORD_BYTES: Final = 16384
"""Most plaintext bytes of one record (RFC 8446 section 5.1)."""
_SCRATCH_BYTES: Final = 256 * 1024
"""One process-wide buffer for decrypted bytes and one for records on their way out; used only within one call."""
_BIO_BYTES_KEPT: Final = 4096
"""Memory BIOs never shrink: after a larger piece they are replaced, so that an idle session stays small."""

_plain = _ffi.new("char[]", _SCRATCH_BYTES)
_records = _ffi.new("char[]", _SCRATCH_BYTES)

_ERR_LIB_SSL: Final = 20
_ALERT_REASONS: Final = 1000  # SSL_AD_REASON_OFFSET: reasons from here on are alerts that the peer sent
_MAX_PSK_BYTES: Final = (
    64  # RFC 4279 section 5.3 asks for at least this much; longer keys are refused when added
)


class TlsVersion(enum.IntEnum):
    """Protocol versions as they stand on the wire."""

    TLS1_2 = 0x0303
    TLS1_3 = 0x0304

    @property
    def label(self) -> str:
        """`TLSv1.2` or `TLSv1.3`, as OpenSSL and the metrics write it."""
        return "TLSv1.2" if self is TlsVersion.TLS1_2 else "TLSv1.3"


class TlsFailure(Exception):
    """OpenSSL gave up on a connection.

    `reason` is OpenSSL's reason code, `text` its words. Never holds a key or an identity.
    """

    _NOTHING_IN_COMMON: Final = frozenset({193, 118})
    # no shared cipher; no suitable signature algorithm, which is TLS 1.3 for "no usable PSK and no certificate"
    _WRONG_KEY: Final = frozenset({149, 253, 281, 129})
    # digest check failed, binder does not verify, decryption failed or bad record mac, bad decrypt

    def __init__(self, reason: int, text: str) -> None:
        super().__init__(reason, text)
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return self.text

    @property
    def is_no_shared_cipher(self) -> bool:
        """Whether the hello offered nothing that this context allows."""
        return self.reason in self._NOTHING_IN_COMMON

    @property
    def is_wrong_key(self) -> bool:
        """Whether the proof of the key failed: bad Finished in TLS 1.2, bad binder in TLS 1.3."""
        return self.reason in self._WRONG_KEY

    @property
    def alert_received(self) -> int | None:
        """The alert description that the peer sent, if that is what ended the connection."""
        return self.reason - _ALERT_REASONS if self.reason >= _ALERT_REASONS else None


def library_version() -> str:
    """The version of the OpenSSL that `cryptography` carries, such as `OpenSSL 4.0.3`."""
    return SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode("ascii").rsplit(" ", 3)[0]


def _failure() -> TlsFailure:
    """Empty OpenSSL's error queue into one exception: the first entry of the TLS layer names the cause."""
    cause = 0
    while code := _lib.ERR_get_error():
        if not cause or (cause >> 23 & 0xFF != _ERR_LIB_SSL and code >> 23 & 0xFF == _ERR_LIB_SSL):
            cause = code
    if not cause:
        return TlsFailure(0, "closed by the peer")
    reason = _lib.ERR_GET_REASON(cause)
    text = _lib.ERR_reason_error_string(cause)
    words = "unknown" if text == _ffi.NULL else _ffi.string(text).decode("ascii", "replace")
    return TlsFailure(reason, _CLEARER_WORDS.get(reason, words))


_CLEARER_WORDS: Final = {
    118: "TLS 1.3 with nothing to prove: it takes an identity and psk_dhe_ke"  # no suitable signature algorithm
}


_OPTIONS: Final = (
    SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION | SSL.OP_CIPHER_SERVER_PREFERENCE
)


def _new_context(method: int, lowest: TlsVersion, highest: TlsVersion) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(lowest)
    context.set_max_proto_version(highest)
    context.set_options(_OPTIONS)
    context.set_session_cache_mode(
        SSL.SESS_CACHE_OFF
    )  # no resumption: tickets and cache both off, in both versions
    context.set_mode(_lib.SSL_MODE_RELEASE_BUFFERS)
    return context


def _use_suites(context: SSL.Context, tls12: Sequence[str], tls13: Sequence[str]) -> None:
    """Allow exactly these suites, in order of preference, by OpenSSL's names."""
    try:
        if tls12:
            context.set_cipher_list(":".join(tls12).encode("ascii"))
        if tls13:
            context.set_tls13_ciphersuites(":".join(tls13).encode("ascii"))
    except SSL.Error as exc:
        raise ConfigurationError(
            f"this OpenSSL knows none of the cipher suites {', '.join((*tls12, *tls13))}"
        ) from exc


_TLS12_GROUPS: Final = b"P-256:X25519:P-384:P-521:X448:ffdhe2048:ffdhe3072"
"""P-256 stands first, at 4 us more per handshake: wolfSSL before 5.7.0 offers X25519 and fails on it in ECDHE-PSK."""
_FFDHE2048: Final = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group ffdhe2048 (RFC 7919 appendix A.1)."""


def _use_dhe(context: Any) -> None:
    """Give a context the group for clients that name none; those that do get theirs by RFC 7919 section 4."""
    pem = _lib.BIO_new_mem_buf(_FFDHE2048, len(_FFDHE2048))
    group = _lib.PEM_read_bio_DHparams(pem, _ffi.NULL, _ffi.NULL, _ffi.NULL)
    _lib.BIO_free(pem)
    assert group != _ffi.NULL, "our own constant"
    accepted = _lib.SSL_CTX_set_tmp_dh(context, group)
    _lib.DH_free(group)
    if accepted != 1:
        _lib.ERR_clear_error()
        raise ConfigurationError("this OpenSSL takes no finite-field group: switch `allow_dhe_psk` off")


class ServerContext:
    """The server's side of one version: suites, hint, application protocols.

    `version` is the only version spoken. `suites` are OpenSSL's names in order of preference. `hint` is the identity
    hint of TLS 1.2 (RFC 4279 section 2), 1 to 128 bytes, or None: an empty hint is never sent. `alpn` lists what is
    accepted, best first (RFC 7301); a client whose protocols are all unknown goes on without one. `short_tags` and
    `dhe` say that `suites` has some of these kinds. `record_bytes_max` bounds the plaintext of the records sent, None is
    16384; a maximum fragment length that the client asks for (RFC 6066 section 4) OpenSSL keeps by itself.
    """

    def __init__(
        self,
        version: TlsVersion,
        suites: Sequence[str],
        *,
        hint: str | None = None,
        alpn: Sequence[bytes] = (),
        short_tags: bool = False,
        dhe: bool = False,
        record_bytes_max: int | None = None,
    ) -> None:
        self.version = version
        self.suites = tuple(suites)
        self.alpn = tuple(alpn)
        self._record_bytes = record_bytes_max or RECORD_BYTES
        self._context = _new_context(SSL.TLS_SERVER_METHOD, version, version)
        raw = self._context._context  # noqa: SLF001 - pyOpenSSL's documented way to extend a Context
        if version is TlsVersion.TLS1_2:
            _use_suites(self._context, [*suites, *(["@SECLEVEL=0"] if short_tags else [])], ())
            if _lib.SSL_CTX_set1_curves_list(raw, _TLS12_GROUPS) != 1:
                _lib.ERR_clear_error()  # a build without one of them keeps its own list
            if dhe:
                _use_dhe(raw)
            _lib.SSL_CTX_set_psk_server_callback(raw, _psk_server_callback)
            if hint and _lib.SSL_CTX_use_psk_identity_hint(raw, hint.encode("utf-8")) != 1:
                _lib.ERR_clear_error()
                raise ConfigurationError(f"the identity hint {hint!r} is too long: 128 bytes at most")
        else:
            _use_suites(self._context, (), suites)
            _lib.SSL_CTX_set_psk_find_session_callback(raw, _psk_find_session_callback)
        if alpn:
            _lib.SSL_CTX_set_alpn_select_cb(raw, _alpn_select_callback, _ffi.NULL)

    def engine(self, find_key: "FindKey") -> "Engine":
        """A server engine that asks `find_key` for the key of an identity."""
        engine = Engine(self._context, find_key=find_key, alpn=self.alpn, record_bytes=self._record_bytes)
        _lib.SSL_set_accept_state(engine.ssl)
        return engine


class ClientContext:
    """The client's side: versions from `lowest` to `highest`, suites, and application protocols to offer."""

    def __init__(
        self,
        tls12: Sequence[str],
        tls13: Sequence[str],
        *,
        lowest: TlsVersion = TlsVersion.TLS1_2,
        highest: TlsVersion = TlsVersion.TLS1_3,
        alpn: Sequence[bytes] = (),
        trace: "Trace | None" = None,
    ) -> None:
        self._context = _new_context(SSL.TLS_CLIENT_METHOD, lowest, highest)
        # No authority is trusted, so a server that shows a certificate in place of proving the key is refused.
        self._context.set_verify(SSL.VERIFY_PEER)
        _use_suites(self._context, tls12, tls13)
        self._alpn = tuple(alpn)
        if alpn:
            self._context.set_alpn_protos(list(alpn))
        raw = self._context._context  # noqa: SLF001 - pyOpenSSL's documented way to extend a Context
        _lib.SSL_CTX_set_psk_client_callback(raw, _psk_client_callback)
        if highest is TlsVersion.TLS1_3:
            _lib.SSL_CTX_set_psk_use_session_callback(raw, _psk_use_session_callback)
        if trace is not None:
            self._trace = _message_callback(trace)  # kept as long as the context may call it
            _lib.SSL_CTX_set_msg_callback(raw, self._trace)

    def engine(self, choose_key: "ChooseKey", server_name: str | None = None) -> "Engine":
        """A client engine that asks `choose_key` what to offer, and names the server in SNI if given."""
        engine = Engine(self._context, choose_key=choose_key, alpn=self._alpn)
        if server_name is not None:
            _lib.SSL_set_tlsext_host_name(engine.ssl, server_name.encode("idna"))
        _lib.SSL_set_connect_state(engine.ssl)
        return engine


Trace = Callable[[bool, int, int, bytes], None]
"""sent by us, wire version, content type, bytes: one message or record header in the clear, as OpenSSL's `-msg` has it."""


def _message_callback(trace: Trace) -> Any:
    """The C callback of one context that is traced. What `trace` raises is printed and goes no further."""

    @_ffi.callback("void(int, int, int, const void *, size_t, SSL *, void *)")  # type: ignore[untyped-decorator]  # cffi has no types
    def callback(
        sent: int, version: int, content_type: int, data: Any, size: int, _ssl: Any, _argument: Any
    ) -> None:
        trace(bool(sent), version, content_type, _ffi.buffer(data, size)[:])

    return callback


FindKey = Callable[[bytes], tuple[bytes, str] | None]
"""identity bytes -> (key, hash name "sha256" or "sha384") or None: the identity is not the chosen one."""
ChooseKey = Callable[[bytes | None], tuple[bytes, bytes, str] | None]
"""hint (None: no hint, or TLS 1.3 which has none) -> (identity, key, hash name) or None: give up."""

_SUITE_OF_HASH: Final = {"sha256": b"\x13\x01", "sha384": b"\x13\x02"}


class Engine:
    """One SSL object between two memory BIOs. Not safe for use by several threads at once.

    The attributes without an underscore are for the callbacks of this module.
    """

    __slots__ = (
        "_address",
        "_context",
        "_from_ssl",
        "_grown",
        "_into_ssl",
        "_record_bytes",
        "choose_key",
        "error",
        "find_key",
        "identity",
        "protocols",
        "ssl",
    )

    def __init__(
        self,
        context: SSL.Context,
        *,
        find_key: FindKey | None = None,
        choose_key: ChooseKey | None = None,
        alpn: tuple[bytes, ...] = (),
        record_bytes: int = RECORD_BYTES,
    ) -> None:
        self._record_bytes = record_bytes
        self._context = (
            context  # OpenSSL counts its own reference; this one keeps pyOpenSSL's callbacks alive
        )
        self.find_key = find_key
        self.choose_key = choose_key
        self.protocols = alpn
        self.identity: bytes | None = None  # what the client callback offered, kept while OpenSSL may read it
        self.error: BaseException | None = None
        self.ssl = _ffi.gc(_lib.SSL_new(context._context), _lib.SSL_free)  # noqa: SLF001 - as above
        self._address = int(_ffi.cast("uintptr_t", self.ssl))
        self._grown = False
        self._new_bios()

    def _new_bios(self) -> None:
        self._into_ssl = _lib.BIO_new(_lib.BIO_s_mem())
        self._from_ssl = _lib.BIO_new(_lib.BIO_s_mem())
        _lib.SSL_set_bio(self.ssl, self._into_ssl, self._from_ssl)  # owns both, and frees the old ones

    def feed(self, data: "bytes | bytearray | memoryview") -> None:
        """Give OpenSSL bytes that came from the network. Read all that they yield before feeding more."""
        size = len(data)
        if size > _BIO_BYTES_KEPT:
            self._grown = True
        _lib.BIO_write(self._into_ssl, _ffi.from_buffer(data), size)

    def handshake(self) -> bool:
        """Go on with the handshake. True when it is complete, False when more bytes are needed.

        Raises TlsFailure; what must still be sent (the alert) is in `drain`.
        """
        _handshaking[self._address] = self
        try:
            result = _lib.SSL_do_handshake(self.ssl)
        finally:
            del _handshaking[self._address]
        if self.error is not None:
            error, self.error = self.error, None
            _lib.ERR_clear_error()
            raise error
        if result == 1:
            return True
        if _lib.SSL_get_error(self.ssl, result) == _WANT_READ:
            return False
        raise _failure()

    def read(self) -> bytes | None:
        """Decrypted bytes of all records fed so far (`b""`: none yet), or None after the peer's close_notify.

        At most 256 KiB at a time; feed no more than that before reading. Raises TlsFailure.
        """
        filled = 0
        while True:
            result = _lib.SSL_read(self.ssl, _plain + filled, _SCRATCH_BYTES - filled)
            if result <= 0:
                break
            filled += result
            if filled > _SCRATCH_BYTES - RECORD_BYTES:
                return bytes(_ffi.buffer(_plain, filled))
        if filled:
            # A close or an error behind the data shows again at the next call.
            return bytes(_ffi.buffer(_plain, filled))
        error = _lib.SSL_get_error(self.ssl, result)
        if error == _WANT_READ:
            return b""
        if error == _ZERO_RETURN:
            return None
        raise _failure()

    def write(self, data: "bytes | bytearray | memoryview") -> None:
        """Encrypt `data` whole; the records wait in `drain`. Raises TlsFailure after a failure or a close."""
        view = memoryview(data)
        while view:
            piece = view[: self._record_bytes]
            result = _lib.SSL_write(self.ssl, _ffi.from_buffer(piece), len(piece))
            if result <= 0:
                raise _failure()
            view = view[result:]

    def shutdown(self) -> None:
        """Queue close_notify; once is enough. After a fatal alert there is nothing left to say."""
        if _lib.SSL_shutdown(self.ssl) < 0:
            _lib.ERR_clear_error()

    def drain(self) -> bytes:
        """Records that must go to the network, all of them."""
        size = _lib.BIO_read(self._from_ssl, _records, _SCRATCH_BYTES)
        if size <= 0:
            data = b""
        elif size < _SCRATCH_BYTES:
            data = _ffi.buffer(_records, size)[:]
        else:
            pieces = []
            while size > 0:
                pieces.append(_ffi.buffer(_records, size)[:])
                size = _lib.BIO_read(self._from_ssl, _records, _SCRATCH_BYTES)
            data = b"".join(pieces)
        if self._grown or len(data) > _BIO_BYTES_KEPT:
            self._grown = False
            self._new_bios()
        return bytes(data)

    def free(self) -> None:
        """Give the SSL object back to OpenSSL now instead of at garbage collection. The engine is unusable after."""
        _ffi.release(self.ssl)

    @property
    def version(self) -> str:
        """Negotiated version: `TLSv1.2` or `TLSv1.3`."""
        number = _lib.SSL_version(self.ssl)
        return "TLSv1.3" if number == TlsVersion.TLS1_3 else "TLSv1.2"

    @property
    def cipher(self) -> str:
        """Negotiated suite by OpenSSL's name, empty before it is known."""
        cipher = _lib.SSL_get_current_cipher(self.ssl)
        if cipher == _ffi.NULL:
            return ""
        address = int(_ffi.cast("uintptr_t", cipher))  # the library's own constants: few, and they never move
        name = _cipher_names.get(address)
        if name is None:
            name = _cipher_names[address] = _ffi.string(_lib.SSL_CIPHER_get_name(cipher)).decode("ascii")
        return name

    @property
    def alpn(self) -> bytes:
        """Negotiated application protocol, empty for none."""
        if not self.protocols:
            return b""
        data = _ffi.new("unsigned char **")
        size = _ffi.new("unsigned int *")
        _lib.SSL_get0_alpn_selected(self.ssl, data, size)
        return bytes(_ffi.buffer(data[0], size[0])) if size[0] else b""


_WANT_READ: Final = _lib.SSL_ERROR_WANT_READ
_ZERO_RETURN: Final = _lib.SSL_ERROR_ZERO_RETURN
_handshaking: dict[int, Engine] = {}
_cipher_names: dict[int, str] = {}


def _engine_of(ssl: Any) -> Engine:
    return _handshaking[int(_ffi.cast("uintptr_t", ssl))]


def _tls13_session(ssl: Any, key: bytes, hash_name: str) -> Any:
    """A session that stands for an external PSK (RFC 8446 section 4.2.11): key, hash by way of a suite, version."""
    session = _lib.Cryptography_SSL_SESSION_new()
    cipher = _lib.SSL_CIPHER_find(ssl, _SUITE_OF_HASH[hash_name])
    _lib.SSL_SESSION_set1_master_key(session, key, len(key))
    _lib.SSL_SESSION_set_cipher(session, cipher)
    _lib.SSL_SESSION_set_protocol_version(session, TlsVersion.TLS1_3)
    return session


@_ffi.callback("unsigned int(SSL *, char *, unsigned char *, unsigned int)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _psk_server_callback(ssl: Any, identity: Any, psk: Any, psk_bytes_max: int) -> int:
    engine = _engine_of(ssl)
    try:
        assert engine.find_key is not None
        found = engine.find_key(_ffi.string(identity))
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if found is None:
        return 0
    key = found[0]
    assert len(key) <= min(psk_bytes_max, _MAX_PSK_BYTES)
    _ffi.memmove(psk, key, len(key))
    return len(key)


@_ffi.callback("int(SSL *, unsigned char *, size_t, SSL_SESSION **)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _psk_find_session_callback(ssl: Any, identity: Any, identity_bytes: int, session: Any) -> int:
    engine = _engine_of(ssl)
    session[0] = _ffi.NULL
    try:
        assert engine.find_key is not None
        found = engine.find_key(_ffi.buffer(identity, identity_bytes)[:])
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if found is not None:
        session[0] = _tls13_session(ssl, *found)
    return 1


@_ffi.callback(
    "int(SSL *, unsigned char **, unsigned char *, unsigned char *, unsigned int, void *)", error=3
)  # type: ignore[untyped-decorator]  # cffi has no types
def _alpn_select_callback(
    ssl: Any, out: Any, out_bytes: Any, offered: Any, offered_bytes: int, _: Any
) -> int:
    engine = _engine_of(ssl)
    offers: dict[bytes, int] = {}
    data = _ffi.buffer(offered, offered_bytes)[:]
    position = 0
    while position < offered_bytes:
        size = data[position]
        offers.setdefault(data[position + 1 : position + 1 + size], position + 1)
        position += 1 + size
    for protocol in engine.protocols:
        if protocol in offers:
            out[0] = offered + offers[protocol]
            out_bytes[0] = len(protocol)
            return int(_lib.SSL_TLSEXT_ERR_OK)
    return int(_lib.SSL_TLSEXT_ERR_NOACK)


@_ffi.callback("unsigned int(SSL *, char *, char *, unsigned int, unsigned char *, unsigned int)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _psk_client_callback(  # noqa: PLR0917 - OpenSSL's signature
    ssl: Any, hint: Any, identity: Any, identity_bytes_max: int, psk: Any, psk_bytes_max: int
) -> int:
    engine = _engine_of(ssl)
    try:
        assert engine.choose_key is not None
        chosen = engine.choose_key(None if hint == _ffi.NULL else _ffi.string(hint))
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if chosen is None or len(chosen[0]) >= identity_bytes_max or len(chosen[1]) > psk_bytes_max:
        return 0
    name, key, _ = chosen
    _ffi.memmove(identity, name + b"\0", len(name) + 1)
    _ffi.memmove(psk, key, len(key))
    return len(key)


@_ffi.callback("int(SSL *, EVP_MD *, unsigned char **, size_t *, SSL_SESSION **)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _psk_use_session_callback(
    ssl: Any, _digest: Any, identity: Any, identity_bytes: Any, session: Any
) -> int:
    engine = _engine_of(ssl)
    session[0] = _ffi.NULL
    try:
        assert engine.choose_key is not None
        chosen = engine.choose_key(None)
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if chosen is None:
        return 1  # nothing to offer in TLS 1.3; TLS 1.2 may still ask with a hint
    name, key, hash_name = chosen
    engine.identity = _ffi.from_buffer(name)  # OpenSSL copies it after this callback returned
    identity[0] = _ffi.cast("unsigned char *", engine.identity)
    identity_bytes[0] = len(name)
    session[0] = _tls13_session(ssl, key, hash_name)
    return 1
