"""The ClientHello, read before an SSL object exists.

Theory of operation. The scanner is fed what the socket gives, in pieces of any size. It takes the records apart
(RFC 8446 section 5.1, RFC 5246 section 6.2.1), joins their fragments to one handshake message, and decodes it
(RFC 8446 section 4.1.2, RFC 5246 section 7.4.1.2). Nothing is consumed: `received` is every byte that was fed,
for OpenSSL, which does the real handshake and checks everything again.

Invariants:
- The verdict depends on the bytes alone, never on how they were cut: a rule is applied as soon as the bytes it
  needs are there, in the order in which they stand on the wire, and not earlier on longer pieces.
- Whatever the bytes are, `feed` returns or raises PeerError.
- After a `feed` that returned None no more than `hello_bytes_max` bytes and one record header are held.
"""

import re
import struct
from typing import Final

import msgspec

from gateway.errors import PeerError, PeerFault
from gateway.wire.suites import suite_name

__all__ = [
    "ClientHello",
    "HelloScanner",
    "OfferedPsk",
    "decode_chosen_suite",
    "decode_client_hello",
    "decode_pre_shared_keys",
    "suite_name",
]

TLS_1_2: Final = 0x0303
TLS_1_3: Final = 0x0304
PSK_DHE_KE: Final = 1  # RFC 8446 section 4.2.9


class OfferedPsk(msgspec.Struct, frozen=True, gc=False):
    """One identity of the pre_shared_key extension (RFC 8446 section 4.2.11).

    `binder_length` (bytes, 32 to 255) tells the hash the client binds the key to: 32 is SHA-256, 48 is SHA-384.
    """

    identity: bytes
    binder_length: int


class ClientHello(msgspec.Struct, frozen=True):
    """What a client offers, each list in the client's order, GREASE values (RFC 8701) included.

    `versions` is the supported_versions extension or, without one, the legacy_version, which stands for everything
    older too and counts as TLS 1.2 at most (RFC 8446 section 4.2.1). `server_name` is in lower case. `psks` may hold as many entries as fit
    the hello, over a thousand: whoever looks each one up sets a bound. `psk_modes` tells how the client would use them.
    `signatures` is the signature_algorithms extension, empty without one.
    """

    legacy_version: int
    versions: tuple[int, ...]
    suites: tuple[int, ...]
    server_name: str | None
    alpn: tuple[bytes, ...]
    psks: tuple[OfferedPsk, ...]
    groups: tuple[int, ...]
    psk_modes: tuple[int, ...] = ()
    signatures: tuple[int, ...] = ()

    @property
    def offers_tls13(self) -> bool:
        return TLS_1_3 in self.versions

    @property
    def offers_psk_dhe_ke(self) -> bool:
        """Whether TLS 1.3 with a PSK could have forward secrecy."""
        return PSK_DHE_KE in self.psk_modes


def decode_chosen_suite(server_hello: bytes) -> int | None:
    """The suite that a ServerHello chose (RFC 8446 section 4.1.3), header included; None when it is cut short."""
    at = 39 + server_hello[38] if len(server_hello) > 38 else len(server_hello)  # noqa: PLR2004 -- the session id's length
    return int.from_bytes(server_hello[at : at + 2]) if len(server_hello) >= at + 2 else None


class HelloScanner:
    """Collects the first flight of a client until its ClientHello is whole.

    `hello_bytes_max` bounds the bytes on the wire up to the last byte of the hello, record headers included.
    """

    __slots__ = ("_at", "_hello_size", "_left", "_max", "_message", "_wire")

    def __init__(self, hello_bytes_max: int = 16384) -> None:
        self._max = hello_bytes_max
        self._wire = bytearray()
        self._at = 0  # the first byte of _wire that is not taken apart yet
        self._left = 0  # bytes of the current record after _at that belong to its fragment; 0: a header comes
        self._message = bytearray()  # fragments joined
        self._hello_size = 0  # bytes of the message with its header; 0: not known yet

    @property
    def received(self) -> bytes:
        """Everything that was fed, what came after the hello too."""
        return bytes(self._wire)

    def feed(self, data: bytes) -> ClientHello | None:
        """Take the next bytes of the peer; the hello once it is whole, else None. Not to be called after that.

        Raises PeerError: NOT_TLS, UNSUPPORTED_RECORD (another message where the hello must stand), OVERSIZED,
        RECORD_OVERFLOW, MALFORMED, ILLEGAL_PARAMETER, UNRECOGNIZED_NAME (a server name that cannot be one).
        """
        wire, message = self._wire, self._message
        wire += data
        while True:
            if not self._left and not self._open_record():
                return None
            piece = wire[self._at : self._at + self._left]
            message += piece
            self._at += len(piece)
            self._left -= len(piece)
            if not self._hello_size and len(message) >= MESSAGE_HEADER_BYTES:
                self._hello_size = self._measure_hello()
            if self._hello_size:
                self._check_bound()
                if len(message) >= self._hello_size:
                    return decode_client_hello(bytes(message[MESSAGE_HEADER_BYTES : self._hello_size]))
            if self._left:
                return None

    def _open_record(self) -> bool:
        """Take the header of the next record; False while it is not whole."""
        wire, at = self._wire, self._at
        if at == 0 and wire and wire[0] != HANDSHAKE:
            _refuse_start(wire)
            return False
        if len(wire) - at < RECORD_HEADER_BYTES:
            return False
        kind, major, size = _record_header(wire, at)
        if major != VERSION_MAJOR:
            fault = PeerFault.MALFORMED if at else PeerFault.NOT_TLS
            raise PeerError(fault, f"a record of version {major}.x, TLS has 3.x")
        if kind != HANDSHAKE:
            raise PeerError(PeerFault.UNSUPPORTED_RECORD, f"a record of type {kind} inside the ClientHello")
        if size == 0:
            raise PeerError(PeerFault.MALFORMED, "a handshake record without content")
        if size > FRAGMENT_BYTES_MAX:
            raise PeerError(
                PeerFault.RECORD_OVERFLOW,
                f"a record of {size} bytes, at most {FRAGMENT_BYTES_MAX} are allowed",
            )
        self._at = at + RECORD_HEADER_BYTES
        self._left = size
        self._check_bound()
        return True

    def _measure_hello(self) -> int:
        word = int.from_bytes(self._message[:MESSAGE_HEADER_BYTES])
        kind, size = word >> 24, word & 0xFFFFFF
        if kind != CLIENT_HELLO:
            raise PeerError(
                PeerFault.UNSUPPORTED_RECORD, f"a handshake message of type {kind} instead of a ClientHello"
            )
        return size + MESSAGE_HEADER_BYTES

    def _check_bound(self) -> None:
        """Refuse a hello that, as far as its length is known, ends past the bound on the wire."""
        missing = (self._hello_size or MESSAGE_HEADER_BYTES) - len(self._message)
        if self._at + missing > self._max:
            raise PeerError(PeerFault.OVERSIZED, f"a ClientHello of more than {self._max} bytes on the wire")


def decode_client_hello(body: bytes) -> ClientHello:
    """Decode the body of a ClientHello, without the header of the handshake message.

    Raises PeerError MALFORMED for what RFC 8446 section 4.1.2 does not allow, UNRECOGNIZED_NAME (see HelloScanner).
    """
    try:
        return _decode(body)
    except (struct.error, IndexError) as exc:
        raise _past_the_end() from exc


def decode_pre_shared_keys(data: bytes) -> tuple[OfferedPsk, ...]:
    """Decode the content of pre_shared_key alone. Raises PeerError as `decode_client_hello` does."""
    try:
        return _decode_psks(data)
    except (struct.error, IndexError) as exc:
        raise _past_the_end() from exc


# Record layer and handshake header

HANDSHAKE: Final = 22  # content type, RFC 8446 section 5.1
OTHER_CONTENT: Final = range(20, 25)  # the content types of TLS, with heartbeat (RFC 6520)
VERSION_MAJOR: Final = 3
RECORD_HEADER_BYTES: Final = 5
FRAGMENT_BYTES_MAX: Final = 1 << 14  # RFC 8446 section 5.1
CLIENT_HELLO: Final = 1
MESSAGE_HEADER_BYTES: Final = 4

# RFC 9110 section 9 and PATCH; `PRI` opens HTTP/2 (RFC 9113 section 3.4).
HTTP_STARTS: Final = tuple(
    f"{method} ".encode()
    for method in ("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "PRI")
)
MQTT_CONNECT: Final = 0x10

_record_header = struct.Struct(">BBxH").unpack_from


def _refuse_start(wire: bytearray) -> None:
    """Say what came instead of TLS. Returns while the bytes could still become something with a name."""
    first = wire[0]
    if first in OTHER_CONTENT:
        if len(wire) == 1:
            return
        if wire[1] == VERSION_MAJOR:
            raise PeerError(PeerFault.UNSUPPORTED_RECORD, f"a record of type {first} before any ClientHello")
    if wire.startswith(HTTP_STARTS):
        raise PeerError(PeerFault.NOT_TLS, "plain HTTP instead of TLS")
    if any(start.startswith(wire) for start in HTTP_STARTS):
        return
    if first == MQTT_CONNECT:
        raise PeerError(PeerFault.NOT_TLS, "not TLS: the first byte is 0x10, as in a plain MQTT CONNECT")
    if first & 0x80:  # RFC 5246 appendix E.2: two bytes of length, the highest bit set, then message type 1
        kind = wire[2:3]
        if not kind:
            return
        if kind[0] == CLIENT_HELLO:
            raise PeerError(PeerFault.NOT_TLS, "a hello in the format of SSL 2.0")
    raise PeerError(PeerFault.NOT_TLS, f"not TLS: the first byte is 0x{first:02x}")


# The message

SERVER_NAME: Final = 0  # RFC 6066 section 3
SUPPORTED_GROUPS: Final = 10  # RFC 8446 section 4.2.7
SIGNATURE_ALGORITHMS: Final = 13  # RFC 8446 section 4.2.3, RFC 5246 section 7.4.1.4.1
ALPN: Final = 16  # RFC 7301 section 3.1
PRE_SHARED_KEY: Final = 41  # RFC 8446 section 4.2.11
SUPPORTED_VERSIONS: Final = 43  # RFC 8446 section 4.2.1
PSK_KEY_EXCHANGE_MODES: Final = 45  # RFC 8446 section 4.2.9

SESSION_ID_BYTES_MAX: Final = 32
BINDER_BYTES_MIN: Final = 32
HOST_NAME: Final = 0

# What can be a host name: 1 to 255 bytes, none of them a control character or a space.
_host_name = re.compile(rb"[^\x00-\x20\x7f]{1,255}").fullmatch
_hello_start = struct.Struct(">H32xB").unpack_from
_u16 = struct.Struct(">H").unpack_from
_two_u16 = struct.Struct(">HH").unpack_from


def _malformed(what: str) -> PeerError:
    return PeerError(PeerFault.MALFORMED, f"malformed ClientHello: {what}")


def _past_the_end() -> PeerError:
    return _malformed("a field reaches past the end")


def _decode(body: bytes) -> ClientHello:
    legacy_version, session_id_size = _hello_start(body, 0)
    if session_id_size > SESSION_ID_BYTES_MAX:
        raise _malformed(f"a session id of {session_id_size} bytes")
    at = 35 + session_id_size
    (suites_size,) = _u16(body, at)
    suites = _u16_list(body, at + 2, suites_size)
    at += 2 + suites_size
    compressions = body[at]
    if compressions == 0:
        raise _malformed("no compression method")
    extensions = _split_extensions(body, at + 1 + compressions)
    versions, name, alpn, psks, groups, modes, signatures = map(extensions.get, _DECODED)
    return ClientHello(
        legacy_version=legacy_version,
        versions=(min(legacy_version, TLS_1_2),) if versions is None else _decode_versions(versions),
        suites=suites,
        server_name=None if name is None else _decode_server_name(name),
        alpn=() if alpn is None else _decode_alpn(alpn),
        psks=() if psks is None else _decode_psks(psks),
        groups=() if groups is None else _decode_u16_list(groups, "supported_groups"),
        psk_modes=() if modes is None else _decode_psk_modes(modes),
        signatures=() if signatures is None else _decode_u16_list(signatures, "signature_algorithms"),
    )


def _u16_list(data: bytes, at: int, size: int) -> tuple[int, ...]:
    if not size or size % 2:
        raise _malformed(f"a list of 16-bit values of {size} bytes")
    return struct.unpack_from(f">{size // 2}H", data, at)


def _split_extensions(body: bytes, at: int) -> dict[int, bytes]:
    """The extensions from `at` to the end of the body; a hello may end without any (RFC 8446 section 4.1.2)."""
    end = len(body)
    extensions: dict[int, bytes] = {}
    if at == end:
        return extensions
    (size,) = _u16(body, at)
    at += 2
    if at + size != end:
        raise _malformed("extensions and message end apart")
    kind = 0
    while at < end:
        kind, size = _two_u16(body, at)
        if kind in extensions:
            raise _malformed(f"extension {kind} twice")
        at += 4 + size
        extensions[kind] = body[at - size : at]
    if at != end:
        raise _malformed("an extension reaches past the end")
    if PRE_SHARED_KEY in extensions and kind != PRE_SHARED_KEY:
        raise PeerError(
            PeerFault.ILLEGAL_PARAMETER, "malformed ClientHello: pre_shared_key is not the last extension"
        )  # section 4.2.11
    return extensions


def _decode_versions(data: bytes) -> tuple[int, ...]:
    if data[0] != len(data) - 1:
        raise _malformed("supported_versions of the wrong length")
    return _u16_list(data, 1, data[0])


def _decode_u16_list(data: bytes, extension: str) -> tuple[int, ...]:
    (size,) = _u16(data, 0)
    if size != len(data) - 2:
        raise _malformed(f"{extension} of the wrong length")
    return _u16_list(data, 2, size)


def _decode_psk_modes(data: bytes) -> tuple[int, ...]:
    if not data[0] or data[0] != len(data) - 1:
        raise _malformed("psk_key_exchange_modes of the wrong length")
    return tuple(data[1:])


def _decode_server_name(data: bytes) -> str | None:
    """One name of each type at most, each behind a 16-bit length (RFC 6066 section 3).

    The name is ASCII there; bytes of another encoding, which older clients send, come out as escapes. What cannot be
    a name is answered as an unknown one, as the section allows; an address is not allowed there, but devices send it.
    """
    (size,) = _u16(data, 0)
    if size != len(data) - 2 or not size:
        raise _malformed("server_name of the wrong length")
    names: dict[int, bytes] = {}
    at = 2
    while at < len(data):
        kind = data[at]
        (size,) = _u16(data, at + 1)
        if kind in names:
            raise _malformed("two server names of one type")
        at += 3 + size
        names[kind] = data[at - size : at]
    if at != len(data):
        raise _malformed("a server name reaches past the end")
    name = names.get(HOST_NAME)
    if name is None:
        return None
    if not name:
        raise _malformed("an empty server name")
    if not _host_name(name):
        raise PeerError(PeerFault.UNRECOGNIZED_NAME, "a server name that no host can have")
    return name.lower().decode("ascii", "backslashreplace")


def _decode_alpn(data: bytes) -> tuple[bytes, ...]:
    """Protocol names of 1 to 255 bytes (RFC 7301 section 3.1)."""
    (size,) = _u16(data, 0)
    if size != len(data) - 2 or not size:
        raise _malformed("an ALPN list of the wrong length")
    names = []
    at = 2
    while at < len(data):
        size = data[at]
        if not size:
            raise _malformed("an empty ALPN name")
        at += 1 + size
        names.append(data[at - size : at])
    if at != len(data):
        raise _malformed("an ALPN name reaches past the end")
    return tuple(names)


def _decode_psks(data: bytes) -> tuple[OfferedPsk, ...]:
    """Identities, each with an age that is not used here, and as many binders (RFC 8446 section 4.2.11)."""
    (size,) = _u16(data, 0)
    at, end = 2, 2 + size
    identities = []
    while at < end:
        (size,) = _u16(data, at)
        if not size:
            raise _malformed("an empty PSK identity")
        identities.append(data[at + 2 : at + 2 + size])
        at += 2 + size + 4
    if at != end or not identities:
        raise _malformed("PSK identities of the wrong length")
    (size,) = _u16(data, at)
    at += 2
    if at + size != len(data):
        raise _malformed("PSK binders of the wrong length")
    binder_lengths = []
    while at < len(data):
        size = data[at]
        if size < BINDER_BYTES_MIN:
            raise _malformed(f"a PSK binder of {size} bytes")
        binder_lengths.append(size)
        at += 1 + size
    if at != len(data):
        raise _malformed("a PSK binder reaches past the end")
    if len(identities) != len(binder_lengths):
        raise _malformed(f"{len(identities)} PSK identities and {len(binder_lengths)} binders")
    return tuple(map(OfferedPsk, identities, binder_lengths))


_DECODED: Final = (
    SUPPORTED_VERSIONS, SERVER_NAME, ALPN, PRE_SHARED_KEY, SUPPORTED_GROUPS, PSK_KEY_EXCHANGE_MODES, SIGNATURE_ALGORITHMS,
)  # fmt: skip
