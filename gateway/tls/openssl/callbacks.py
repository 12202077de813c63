"""The C callbacks by which OpenSSL asks for keys and application protocols: see the theory of operation of the package."""

import threading
from typing import TYPE_CHECKING, Any, Final

from gateway.tls.openssl.library import TlsVersion, ffi, lib

if TYPE_CHECKING:
    from gateway.tls.openssl.engine import Engine

__all__ = [
    "RECORDS_BYTES",
    "SCRATCH_BYTES",
    "alpn_select_callback",
    "per_thread",
    "psk_client_callback",
    "psk_find_session_callback",
    "psk_server_callback",
    "psk_use_session_callback",
]


class PerThread(threading.local):
    """What the engines of one thread share, each for the time of one call."""

    engine: "Engine | None" = None
    """Whose `SSL_do_handshake` runs."""

    def __init__(self) -> None:
        self.plain = ffi.new("char[]", SCRATCH_BYTES)
        self.records = ffi.new("char[]", RECORDS_BYTES)


SCRATCH_BYTES: Final = 64 * 1024
"""For decrypted bytes: four records."""
RECORDS_BYTES: Final = SCRATCH_BYTES + 1024
"""For records on their way out: as much, with headers and tags."""
per_thread: Final = PerThread()

_MAX_PSK_BYTES: Final = (
    64  # RFC 4279 section 5.3 asks for at least this much; longer keys are refused when added
)
_TLS1_3: Final = int(TlsVersion.TLS1_3)
_SUITE_OF_HASH: Final = {"sha256": b"\x13\x01", "sha384": b"\x13\x02"}
_ciphers: dict[str, Any] = {}  # of those suites, by hash: the library's own constants, which never move


def _engine() -> "Engine":
    engine = per_thread.engine
    assert engine is not None
    return engine


def _tls13_session(ssl: Any, key: bytes, hash_name: str) -> Any:
    """A session that stands for an external PSK (RFC 8446 section 4.2.11): key, hash by way of a suite, version."""
    cipher = _ciphers.get(hash_name)
    if cipher is None:
        cipher = _ciphers[hash_name] = lib.SSL_CIPHER_find(ssl, _SUITE_OF_HASH[hash_name])
    session = lib.Cryptography_SSL_SESSION_new()
    lib.SSL_SESSION_set1_master_key(session, key, len(key))
    lib.SSL_SESSION_set_cipher(session, cipher)
    lib.SSL_SESSION_set_protocol_version(session, _TLS1_3)
    return session


@ffi.callback("unsigned int(SSL *, char *, unsigned char *, unsigned int)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def psk_server_callback(_ssl: Any, identity: Any, psk: Any, psk_bytes_max: int) -> int:
    engine = per_thread.engine
    assert engine is not None
    try:
        assert engine.find_key is not None
        found = engine.find_key(ffi.string(identity))
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if found is None:
        return 0
    key = found[0]
    size = len(key)
    assert size <= psk_bytes_max
    assert size <= _MAX_PSK_BYTES
    ffi.memmove(psk, key, size)
    return size


@ffi.callback("int(SSL *, unsigned char *, size_t, SSL_SESSION **)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def psk_find_session_callback(ssl: Any, identity: Any, identity_bytes: int, session: Any) -> int:
    engine = _engine()
    session[0] = ffi.NULL
    try:
        assert engine.find_key is not None
        found = engine.find_key(ffi.buffer(identity, identity_bytes)[:])
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if found is not None:
        session[0] = _tls13_session(ssl, *found)
    return 1


@ffi.callback("int(SSL *, unsigned char **, unsigned char *, unsigned char *, unsigned int, void *)", error=3)  # type: ignore[untyped-decorator]  # cffi has no types
def alpn_select_callback(
    _ssl: Any, out: Any, out_bytes: Any, offered: Any, offered_bytes: int, _: Any
) -> int:
    engine = _engine()
    offers: dict[bytes, int] = {}
    data = ffi.buffer(offered, offered_bytes)[:]
    position = 0
    while position < offered_bytes:
        size = data[position]
        offers.setdefault(data[position + 1 : position + 1 + size], position + 1)
        position += 1 + size
    for protocol in engine.protocols:
        if protocol in offers:
            out[0] = offered + offers[protocol]
            out_bytes[0] = len(protocol)
            return int(lib.SSL_TLSEXT_ERR_OK)
    return int(lib.SSL_TLSEXT_ERR_NOACK)


@ffi.callback("unsigned int(SSL *, char *, char *, unsigned int, unsigned char *, unsigned int)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def psk_client_callback(
    _ssl: Any, hint: Any, identity: Any, identity_bytes_max: int, psk: Any, psk_bytes_max: int
) -> int:
    engine = _engine()
    try:
        assert engine.choose_key is not None
        chosen = engine.choose_key(None if hint == ffi.NULL else ffi.string(hint))
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if chosen is None or len(chosen[0]) >= identity_bytes_max or len(chosen[1]) > psk_bytes_max:
        return 0
    name, key, _ = chosen
    ffi.memmove(identity, name + b"\0", len(name) + 1)
    ffi.memmove(psk, key, len(key))
    return len(key)


@ffi.callback("int(SSL *, EVP_MD *, unsigned char **, size_t *, SSL_SESSION **)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def psk_use_session_callback(ssl: Any, _digest: Any, identity: Any, identity_bytes: Any, session: Any) -> int:
    engine = _engine()
    session[0] = ffi.NULL
    try:
        assert engine.choose_key is not None
        chosen = engine.choose_key(None)
    except BaseException as exc:  # noqa: BLE001 - kept for the pump: nothing may be raised into C
        engine.error = exc
        return 0
    if chosen is None:
        return 1  # nothing to offer in TLS 1.3; TLS 1.2 may still ask with a hint
    name, key, hash_name = chosen
    engine.identity = ffi.from_buffer(name)  # OpenSSL copies it after this callback returned
    identity[0] = ffi.cast("unsigned char *", engine.identity)
    identity_bytes[0] = len(name)
    session[0] = _tls13_session(ssl, key, hash_name)
    return 1
