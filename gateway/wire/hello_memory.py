"""Hellos that were read before: most of a fleet are of a few makes, and those of one make say the same."""

import struct
from typing import Final, NamedTuple

from msgspec import structs

from gateway.wire.client_hello import (
    CLIENT_HELLO,
    HANDSHAKE,
    MESSAGE_HEADER_BYTES,
    PRE_SHARED_KEY,
    RECORD_HEADER_BYTES,
    SESSION_ID_BYTES_MAX,
    VERSION_MAJOR,
    ClientHello,
    decode_client_hello,
    decode_pre_shared_keys,
)

__all__ = ["HELLOS_KEPT_MAX", "HelloMemory"]

HELLOS_KEPT_MAX: Final = 256
HELLO_KEPT_BYTES_MAX: Final = 512
WHOLE_BYTES_MIN: Final = 44  # headers, version, random and the length of the session id
WHOLE_BYTES_MAX: Final = 4096  # longer ones are rare; the scanner has their bounds
_whole_start = struct.Struct(">BBxHIH32xB").unpack_from
KEY_SHARE: Final = 51  # RFC 8446 section 4.2.8
_u16 = struct.Struct(">H").unpack_from
_two_u16 = struct.Struct(">HH").unpack_from


class HelloMemory:
    """Remembers what hellos said: those of one make of device are alike but for random and session id, and in TLS 1.3 for
    the key shares, which are not decoded here, and the content of pre_shared_key, which always is.

    At most HELLOS_KEPT_MAX are held, all forgotten when one more comes, so strangers can make it useless and not large.
    """

    __slots__ = ("_hellos", "_spans")

    def __init__(self) -> None:
        self._hellos: dict[tuple[int, bytes, bytes], ClientHello] = {}  # by version, and what may not differ
        self._spans: dict[int, _Spans] = {}  # by the bytes behind the session id

    def read(self, data: bytes) -> ClientHello | None:
        """The hello when `data` is one record with one whole hello and nothing else; None: a scanner must see.

        Raises PeerError as a scanner would that is fed `data`.
        """
        size = len(data)
        if not WHOLE_BYTES_MIN < size <= WHOLE_BYTES_MAX:
            return None
        kind, major, record_size, word, version, session_id_size = _whole_start(data, 0)
        if (
            kind != HANDSHAKE
            or major != VERSION_MAJOR
            or record_size != size - RECORD_HEADER_BYTES
            or word != CLIENT_HELLO << 24 | size - RECORD_HEADER_BYTES - MESSAGE_HEADER_BYTES
            or session_id_size > SESSION_ID_BYTES_MAX
        ):
            return None
        rest = data[WHOLE_BYTES_MIN + session_id_size :]
        spans = self._spans.get(len(rest))
        if spans is not None:
            hello = self._hellos.get((version, *_fixed(rest, spans)))
            if hello is not None:
                return structs.replace(hello, psks=decode_pre_shared_keys(rest[spans.psks :]))
        hello = self._hellos.get((version, rest, b""))
        if hello is None:
            hello = decode_client_hello(data[RECORD_HEADER_BYTES + MESSAGE_HEADER_BYTES :])
            self._remember(version, rest, hello)
        return hello

    def _remember(self, version: int, rest: bytes, hello: ClientHello) -> None:
        spans = _find_spans(rest) if hello.psks else None
        if spans is None and hello.offers_tls13:
            return
        before, between = (rest, b"") if spans is None else _fixed(rest, spans)
        if len(before) + len(between) > HELLO_KEPT_BYTES_MAX:
            return
        if len(self._hellos) >= HELLOS_KEPT_MAX:
            self._hellos.clear()
            self._spans.clear()
        self._hellos[version, before, between] = hello
        if spans is not None:
            self._spans[len(rest)] = spans


class _Spans(NamedTuple):
    """Where the content of key_share begins and ends (0 and 0 without one), and where that of pre_shared_key begins, which is
    the last. What says how long they are stands outside.
    """

    keys: int
    keys_end: int
    psks: int


def _fixed(rest: bytes, spans: _Spans) -> tuple[bytes, bytes]:
    """What stands before the key shares, and between them and the pre-shared keys."""
    return rest[: spans.keys], rest[spans.keys_end : spans.psks]


def _find_spans(rest: bytes) -> _Spans:
    """`rest` is what stands behind the session id of a hello that was decoded and has pre_shared_key."""
    (suites_size,) = _u16(rest, 0)
    at = 2 + suites_size
    at += 1 + rest[at] + 2
    keys = keys_end = 0
    while True:
        kind, size = _two_u16(rest, at)
        at += 4
        if kind == PRE_SHARED_KEY:
            return _Spans(keys, keys_end, at)
        if kind == KEY_SHARE:
            keys, keys_end = at, at + size
        at += size
