"""The library: pyOpenSSL's binding and the symbols that it must have, versions, and what a failure is called."""

import enum
from typing import Any, Final

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

from gateway.errors import ConfigurationError

__all__ = ["TlsFailure", "TlsVersion", "failure", "ffi", "lib", "library_version"]

_binding = Binding()
lib: Final[Any] = _binding.lib
ffi: Final[Any] = _binding.ffi

_SYMBOLS: Final = (
    "BIO_free",
    "BIO_get_mem_data",
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
    "SSL_CTX_set1_sigalgs_list",
    "SSL_CTX_set_alpn_select_cb",
    "SSL_CTX_set_keylog_callback",
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

_missing = [name for name in _SYMBOLS if not hasattr(lib, name)]
if _missing:
    raise ConfigurationError(
        f"the installed `cryptography` lacks {', '.join(_missing)}: install a release whose OpenSSL has PSK"
    )


_ERR_LIB_SSL: Final = 20
_CLOSED: Final = 0  # nothing in the error queue
_ALERT_REASONS: Final = 1000  # SSL_AD_REASON_OFFSET: reasons from here on are alerts that the peer sent


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
    def is_peer_closed(self) -> bool:
        """Whether the peer ended the connection, by an alert or in an orderly way, and broke no rule by that."""
        return self.reason == _CLOSED or self.alert_received is not None

    @property
    def alert_received(self) -> int | None:
        """The alert description that the peer sent, if that is what ended the connection."""
        return self.reason - _ALERT_REASONS if self.reason >= _ALERT_REASONS else None


def library_version() -> str:
    """The version of the OpenSSL that `cryptography` carries, such as `OpenSSL 4.0.3`."""
    return SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode("ascii").rsplit(" ", 3)[0]


def failure() -> TlsFailure:
    """Empty OpenSSL's error queue into one exception: the first entry of the TLS layer names the cause."""
    cause = 0
    while code := lib.ERR_get_error():
        if not cause or (cause >> 23 & 0xFF != _ERR_LIB_SSL and code >> 23 & 0xFF == _ERR_LIB_SSL):
            cause = code
    if not cause:
        return TlsFailure(_CLOSED, "closed by the peer")
    reason = lib.ERR_GET_REASON(cause)
    text = lib.ERR_reason_error_string(cause)
    words = "unknown" if text == ffi.NULL else ffi.string(text).decode("ascii", "replace")
    return TlsFailure(reason, _CLEARER_WORDS.get(reason, words))


_CLEARER_WORDS: Final = {
    118: "TLS 1.3 with nothing to prove: it takes an identity and psk_dhe_ke"  # no suitable signature algorithm
}
