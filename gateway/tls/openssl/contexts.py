"""Contexts: what one end of a connection allows, made by pyOpenSSL and extended by the PSK callbacks."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from OpenSSL import SSL

from gateway.errors import ConfigurationError
from gateway.tls.openssl.callbacks import (
    alpn_select_callback,
    psk_client_callback,
    psk_find_session_callback,
    psk_server_callback,
    psk_use_session_callback,
)
from gateway.tls.openssl.engine import RECORD_BYTES, ChooseKey, Engine, FindKey
from gateway.tls.openssl.library import TlsVersion, ffi, lib
from gateway.tls.openssl.watching import watch_context

__all__ = ["COMMON_SIGNATURES", "ClientContext", "ServerContext", "Trace"]

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
    context.set_mode(lib.SSL_MODE_RELEASE_BUFFERS)
    lib.SSL_CTX_clear_mode(context._context, lib.SSL_MODE_ENABLE_PARTIAL_WRITE)  # noqa: SLF001 - memory takes all
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
COMMON_SIGNATURES: Final = frozenset({0x0401, 0x0403, 0x0804})
"""RSA with SHA-256 (PKCS #1 and PSS) and ECDSA with P-256 and SHA-256: nearly every client names one of them."""
_COMMON_SIGNATURES: Final = b"RSA+SHA256:ECDSA+SHA256:RSA-PSS+SHA256"
_OTHER_SIGNATURES: Final = (
    b"ed25519:ed448:ECDSA+SHA384:ECDSA+SHA512:ECDSA+SHA224:ECDSA+SHA1:"
    b"RSA-PSS+SHA384:RSA-PSS+SHA512:rsa_pss_pss_sha256:rsa_pss_pss_sha384:rsa_pss_pss_sha512:RSA+SHA384:RSA+SHA512:RSA+SHA224:RSA+SHA1:DSA+SHA256:DSA+SHA1"
)
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
    pem = lib.BIO_new_mem_buf(_FFDHE2048, len(_FFDHE2048))
    group = lib.PEM_read_bio_DHparams(pem, ffi.NULL, ffi.NULL, ffi.NULL)
    lib.BIO_free(pem)
    assert group != ffi.NULL, "our own constant"
    accepted = lib.SSL_CTX_set_tmp_dh(context, group)
    lib.DH_free(group)
    if accepted != 1:
        lib.ERR_clear_error()
        raise ConfigurationError("this OpenSSL takes no finite-field group: switch `allow_dhe_psk` off")


class ServerContext:
    """The server's side of one version: suites, hint, application protocols.

    `version` is the only version spoken. `suites` are OpenSSL's names in order of preference. `hint` is the identity
    hint of TLS 1.2 (RFC 4279 section 2), 1 to 128 bytes, or None: an empty hint is never sent. `alpn` lists what is
    accepted, best first (RFC 7301); a client whose protocols are all unknown goes on without one. `short_tags` and
    `dhe` say that `suites` has some of these kinds. `record_bytes_max` bounds the plaintext of the records sent, None is
    16384; a maximum fragment length that the client asks for (RFC 6066 section 4) OpenSSL keeps by itself. `is_watched` is for
    connections that are traced, see `watching`. `other_signatures`: for clients of TLS 1.2 whose signature algorithms have
    none of COMMON_SIGNATURES. No suite with a PSK signs anything, but OpenSSL goes through the lists of both sides, which takes
    microseconds with its own long one, and refuses a client without one in common.
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
        is_watched: bool = False,
        other_signatures: bool = False,
    ) -> None:
        self.version = version
        self.suites = tuple(suites)
        self.alpn = tuple(alpn)
        self._record_bytes = record_bytes_max or RECORD_BYTES
        self._context = _new_context(SSL.TLS_SERVER_METHOD, version, version)
        raw = self._context._context  # noqa: SLF001 - pyOpenSSL's documented way to extend a Context
        if version is TlsVersion.TLS1_2:
            # Level 0 allows short tags and, for want of others, signatures with SHA-1.
            is_lenient = short_tags or other_signatures
            _use_suites(self._context, [*suites, *(["@SECLEVEL=0"] if is_lenient else [])], ())
            signatures = _OTHER_SIGNATURES if other_signatures else _COMMON_SIGNATURES
            if (
                lib.SSL_CTX_set1_curves_list(raw, _TLS12_GROUPS) != 1
                or lib.SSL_CTX_set1_sigalgs_list(raw, signatures) != 1
            ):
                lib.ERR_clear_error()  # a build without one of them keeps its own list
            if dhe:
                _use_dhe(raw)
            lib.SSL_CTX_set_psk_server_callback(raw, psk_server_callback)
            if hint and lib.SSL_CTX_use_psk_identity_hint(raw, hint.encode("utf-8")) != 1:
                lib.ERR_clear_error()
                raise ConfigurationError(f"the identity hint {hint!r} is too long: 128 bytes at most")
        else:
            _use_suites(self._context, (), suites)
            lib.SSL_CTX_set_psk_find_session_callback(raw, psk_find_session_callback)
        if alpn:
            lib.SSL_CTX_set_alpn_select_cb(raw, alpn_select_callback, ffi.NULL)
        if is_watched:
            watch_context(raw)

    def engine(self, find_key: FindKey) -> Engine:
        """A server engine that asks `find_key` for the key of an identity."""
        engine = Engine(self._context, find_key=find_key, alpn=self.alpn, record_bytes=self._record_bytes)
        lib.SSL_set_accept_state(engine.ssl)
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
        lib.SSL_CTX_set_psk_client_callback(raw, psk_client_callback)
        if highest is TlsVersion.TLS1_3:
            lib.SSL_CTX_set_psk_use_session_callback(raw, psk_use_session_callback)
        if trace is not None:
            self._trace = _message_callback(trace)  # kept as long as the context may call it
            lib.SSL_CTX_set_msg_callback(raw, self._trace)

    def engine(self, choose_key: ChooseKey, server_name: str | None = None) -> Engine:
        """A client engine that asks `choose_key` what to offer, and names the server in SNI if given."""
        # It may raise, so before there is anything to free.
        name = None if server_name is None else server_name.encode("idna")
        engine = Engine(self._context, choose_key=choose_key, alpn=self._alpn)
        if name is not None:
            lib.SSL_set_tlsext_host_name(engine.ssl, name)
        lib.SSL_set_connect_state(engine.ssl)
        return engine


Trace = Callable[[bool, int, int, bytes], None]
"""sent by us, wire version, content type, bytes: one message or record header in the clear, as OpenSSL's `-msg` has it."""


def _message_callback(trace: Trace) -> Any:
    """The C callback of one context that is traced. What `trace` raises is printed and goes no further."""

    @ffi.callback("void(int, int, int, const void *, size_t, SSL *, void *)")  # type: ignore[untyped-decorator]  # cffi has no types
    def callback(
        sent: int, version: int, content_type: int, data: Any, size: int, _ssl: Any, _argument: Any
    ) -> None:
        trace(bool(sent), version, content_type, ffi.buffer(data, size)[:])

    return callback
