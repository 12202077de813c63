"""One SSL object between two memory BIOs: the pump."""

from collections.abc import Callable
from typing import Any, Final

from OpenSSL import SSL

from gateway.tls.openssl.callbacks import RECORDS_BYTES, SCRATCH_BYTES, per_thread
from gateway.tls.openssl.library import TlsVersion, failure, ffi, lib
from gateway.tls.openssl.watching import Watch, unwatch, watch

__all__ = ["RECORD_BYTES", "ChooseKey", "Engine", "FindKey"]

RECORD_BYTES: Final = 16384
"""Most plaintext bytes of one record (RFC 8446 section 5.1)."""
_HEADER_BYTES: Final = 5
"""Type, version, and the length of what follows, in two bytes (RFC 8446 section 5.1, RFC 5246 section 6.2.1)."""
_BIO_BYTES_KEPT: Final = 512
"""Memory BIOs never shrink: after a larger piece they are replaced, which takes a microsecond, so that an idle session
stays small. Two that have grown by 2 KiB would be a sixth of what it holds."""
_FIRST_BYTES: Final = 130
_FIRST: Final = bytes(_FIRST_BYTES)
"""Memory BIOs take these at once, for which OpenSSL makes room for 176: a handshake's flights and small messages fit. One
that grows later leaves a hole of its old size, which nothing fills as long as all sessions live."""
_WRITE_BYTES_MAX: Final = 1 << 30
"""Given to one call: its size is an int."""

_NULL: Final = ffi.NULL
_MEMORY: Final = lib.BIO_s_mem()
_WANT_READ: Final = lib.SSL_ERROR_WANT_READ
_ZERO_RETURN: Final = lib.SSL_ERROR_ZERO_RETURN
_TLS1_3: Final = int(TlsVersion.TLS1_3)
_ADDRESS: Final = ffi.typeof("uintptr_t")
_cipher_names: dict[Any, str] = {}

FindKey = Callable[[bytes], tuple[bytes, str] | None]
"""identity bytes -> (key, hash name "sha256" or "sha384") or None: the identity is not the chosen one."""
ChooseKey = Callable[[bytes | None], tuple[bytes, bytes, str] | None]
"""hint (None: no hint, or TLS 1.3 which has none) -> (identity, key, hash name) or None: give up."""


class Engine:
    """One SSL object between two memory BIOs. Not safe for use by several threads at once.

    The attributes without an underscore are for the callbacks of this module.
    """

    __slots__ = (
        "_context",
        "_from_ssl",
        "_grown",
        "_into_ssl",
        "_is_between_records",
        "_is_one_record",
        "_to_drain",
        "_watched_at",
        "_write_bytes",
        "choose_key",
        "error",
        "find_key",
        "identity",
        "is_more",
        "keeps_buffers",
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
        # OpenSSL makes records of 16384 bytes itself; smaller ones are cut here.
        self._write_bytes = record_bytes if record_bytes < RECORD_BYTES else _WRITE_BYTES_MAX
        self._context = (
            context  # OpenSSL counts its own reference; this one keeps pyOpenSSL's callbacks alive
        )
        self.find_key = find_key
        self.choose_key = choose_key
        self.protocols = alpn
        self.identity: bytes | None = None  # what the client callback offered, kept while OpenSSL may read it
        self.error: BaseException | None = None
        self.ssl = lib.SSL_new(context._context)  # noqa: SLF001 - pyOpenSSL gives its SSL_CTX in no other way
        self._is_between_records = False  # whether OpenSSL is known to hold nothing of another record
        self._is_one_record = False  # whether what was fed is one record, neither less nor more
        self.is_more = False  # whether `read` has to be called again before anything is fed
        self._watched_at = 0
        self.keeps_buffers = False  # whether memory BIOs stay as large as they have grown
        self._grown = False
        self._to_drain = False  # whether something ran that may have left records
        self._new_bios()
        for bio in (self._into_ssl, self._from_ssl):
            lib.BIO_write(bio, _FIRST, _FIRST_BYTES)
            lib.BIO_read(bio, per_thread.records, _FIRST_BYTES)

    def _new_bios(self) -> None:
        self._into_ssl = lib.BIO_new(_MEMORY)
        self._from_ssl = lib.BIO_new(_MEMORY)
        lib.SSL_set_bio(self.ssl, self._into_ssl, self._from_ssl)  # owns both, and frees the old ones

    def feed(self, data: bytes) -> None:
        """Give OpenSSL bytes that came from the network. Read all that they yield before feeding more."""
        size = len(data)
        if size > _BIO_BYTES_KEPT:
            self._grown = True
        if self._is_between_records:
            self._is_between_records = False
            self._is_one_record = size > _HEADER_BYTES and size == _HEADER_BYTES + (data[3] << 8 | data[4])
        lib.BIO_write(self._into_ssl, data, size)

    def handshake(self) -> bool:
        """Go on with the handshake. True when it is complete, False when more bytes are needed.

        Raises TlsFailure; what must still be sent (the alert) is in `drain`.
        """
        self._to_drain = True
        per_thread.engine = self
        try:
            result = lib.SSL_do_handshake(self.ssl)
        finally:
            per_thread.engine = None
        if self.error is not None:
            error, self.error = self.error, None
            lib.ERR_clear_error()
            raise error
        if result == 1:
            return True
        if lib.SSL_get_error(self.ssl, result) == _WANT_READ:
            return False
        raise failure()

    @property
    def has_input(self) -> bool:
        """Whether something that was fed is not taken yet."""
        return bool(lib.BIO_get_mem_data(self._into_ssl, _NULL) > 0)

    def read(self) -> bytes | None:
        """Decrypted bytes of the records fed so far (`b""`: none yet), or None after the peer's close_notify.

        At most 64 KiB at a time; read again while it `has_input` or a failure or a close stands behind the data, as
        `is_more` tells. Raises TlsFailure.
        """
        ssl = self.ssl
        plain = per_thread.plain
        filled = lib.SSL_read(ssl, plain, SCRATCH_BYTES)
        data: bytes
        if filled > 0 and self._is_one_record:  # it had data: nothing stands behind it or is to be answered
            self._is_one_record = self.is_more = False
            self._is_between_records = True
            data = ffi.unpack(plain, filled)
            return data
        self._is_one_record = False
        self._to_drain = True  # an alert, or the answer to a key update
        if filled > 0:
            # A record that is taken from the memory BIO is taken whole, so an empty one has nothing more.
            is_more = lib.BIO_get_mem_data(self._into_ssl, _NULL) > 0
            while is_more and filled <= SCRATCH_BYTES - RECORD_BYTES:
                result = lib.SSL_read(ssl, plain + filled, SCRATCH_BYTES - filled)
                if result <= 0:
                    # A close or an error behind the data shows again at the next call; half a record does not.
                    is_more = lib.SSL_get_error(ssl, result) != _WANT_READ
                    break
                filled += result
                is_more = self.has_input
            else:
                self._is_between_records = not is_more
            self.is_more = is_more
            data = ffi.unpack(plain, filled)
            return data
        self.is_more = False
        error = lib.SSL_get_error(ssl, filled)
        if error == _WANT_READ:
            return b""
        if error == _ZERO_RETURN:
            return None
        raise failure()

    def write(self, data: bytes) -> None:
        """Encrypt `data` whole; the records wait in `drain`. Raises TlsFailure after a failure or a close."""
        self._to_drain = True
        size = len(data)
        if 0 < size <= self._write_bytes:
            if lib.SSL_write(self.ssl, data, size) <= 0:
                raise failure()
            return
        for start in range(0, size, self._write_bytes):
            piece = data[start : start + self._write_bytes]
            if lib.SSL_write(self.ssl, piece, len(piece)) <= 0:  # takes all: no partial writes
                raise failure()

    def shutdown(self) -> None:
        """Queue close_notify; once is enough. After a fatal alert there is nothing left to say."""
        self._to_drain = True
        if lib.SSL_shutdown(self.ssl) < 0:
            lib.ERR_clear_error()

    def drain(self) -> bytes:
        """Records that must go to the network, all of them."""
        if not self._to_drain:
            return b""
        self._to_drain = False
        records = per_thread.records
        size = lib.BIO_read(self._from_ssl, records, RECORDS_BYTES)
        data: bytes = ffi.unpack(records, size) if size > 0 else b""
        if size > _BIO_BYTES_KEPT:
            self._grown = True
            if size == RECORDS_BYTES:
                pieces = [data]
                while (size := lib.BIO_read(self._from_ssl, records, RECORDS_BYTES)) > 0:
                    pieces.append(ffi.unpack(records, size))
                data = b"".join(pieces)
        if self._grown and not self.keeps_buffers:
            self._grown = False
            self._new_bios()
        return data

    def release_buffers(self) -> None:
        """Undo `keeps_buffers`: what has grown is replaced now, or by the next `drain` when something is still in there."""
        self.keeps_buffers = False
        if self._grown and not self._to_drain and not self.has_input:
            self._grown = False
            self._new_bios()

    def watch(self, by: Watch) -> None:
        """Tell `by` of every message and secret from now on; only where the context is watched."""
        self._watched_at = int(ffi.cast(_ADDRESS, self.ssl))
        watch(self._watched_at, by)

    def free(self) -> None:
        """Give the SSL object back to OpenSSL, which the owner must do: nothing else does. The engine is unusable after."""
        if self._watched_at:
            unwatch(self._watched_at)
        ssl, self.ssl = self.ssl, _NULL
        lib.SSL_free(ssl)

    @property
    def version(self) -> str:
        """Negotiated version: `TLSv1.2` or `TLSv1.3`."""
        return "TLSv1.3" if lib.SSL_version(self.ssl) == _TLS1_3 else "TLSv1.2"

    @property
    def cipher(self) -> str:
        """Negotiated suite by OpenSSL's name, empty before it is known."""
        cipher = lib.SSL_get_current_cipher(
            self.ssl
        )  # one of the library's own constants: few, and they never move
        name = _cipher_names.get(cipher)
        if name is None:
            if cipher == _NULL:
                return ""
            name = _cipher_names[cipher] = ffi.string(lib.SSL_CIPHER_get_name(cipher)).decode("ascii")
        return name

    @property
    def alpn(self) -> bytes:
        """Negotiated application protocol, empty for none."""
        if not self.protocols:
            return b""
        data = ffi.new("unsigned char **")
        size = ffi.new("unsigned int *")
        lib.SSL_get0_alpn_selected(self.ssl, data, size)
        return bytes(ffi.buffer(data[0], size[0])) if size[0] else b""
