"""What OpenSSL tells of a connection that is traced: its messages, and the lines of a key log.

Both callbacks belong to a context, and an SSL object keeps those that its context had. So a traced connection gets a
context of its own kind (`ServerContext` with `is_watched`), and no other connection pays for it. The callbacks know only the
`SSL *`: an engine's watch stands in `_watches` under that address until the engine is freed.
"""

from typing import Any, Final, Protocol

from gateway.tls.openssl.library import ffi, lib

__all__ = ["Watch", "unwatch", "watch", "watch_context"]

_SHOWN: Final = frozenset({0x14, 0x15, 0x16})
"""ChangeCipherSpec, Alert, Handshake (RFC 8446 section 5.1): not the headers of records, and no application data."""


class Watch(Protocol):
    """Who watches one connection. Neither may raise: C has called."""

    def message(self, *, sent: bool, version: int, content_type: int, data: bytes) -> None:
        """A handshake message, alert or ChangeCipherSpec, in the clear; `sent` by us."""

    def secret(self, line: str) -> None:
        """A line of the key log (NSS format): whoever has it can decrypt this connection."""


_watches: dict[int, Watch] = {}


def watch(ssl_address: int, by: Watch) -> None:
    """Tell `by` of the SSL object at this address, whose context is watched."""
    _watches[ssl_address] = by


def unwatch(ssl_address: int) -> None:
    """The SSL object is about to be freed."""
    if _watches:
        _watches.pop(ssl_address, None)


def watch_context(context: Any) -> None:
    """Have the SSL objects of this `SSL_CTX *` watched."""
    lib.SSL_CTX_set_msg_callback(context, _message_callback)
    lib.SSL_CTX_set_keylog_callback(context, _keylog_callback)


@ffi.callback("void(int, int, int, const void *, size_t, SSL *, void *)")  # type: ignore[untyped-decorator]  # cffi has no types
def _message_callback(  # noqa: PLR0917 - OpenSSL's signature
    sent: int, version: int, content_type: int, data: Any, size: int, ssl: Any, _argument: Any
) -> None:
    if content_type not in _SHOWN:
        return
    by = _watches.get(int(ffi.cast("uintptr_t", ssl)))
    if by is not None:
        by.message(
            sent=bool(sent), version=version, content_type=content_type, data=ffi.buffer(data, size)[:]
        )


@ffi.callback("void(SSL *, const char *)")  # type: ignore[untyped-decorator]  # cffi has no types
def _keylog_callback(ssl: Any, line: Any) -> None:
    by = _watches.get(int(ffi.cast("uintptr_t", ssl)))
    if by is not None:
        by.secret(ffi.string(line).decode("ascii"))
