"""The CONNECT packet of MQTT 3.1.1 and 5: read, checked and written anew; and the CONNACK that refuses one.

Only CONNECT is understood here. `ConnectScanner` takes bytes in any pieces up to the end of the packet and keeps what
follows it; it holds at most CONNECT_BYTES_MAX. What is not rewritten is kept as the bytes that came: the connect flags
of session and will, keep-alive, properties, the will itself.

Which refusal goes on the wire (MQTT 3.1.1 section 3.1.4, MQTT 5 section 3.1.4): bytes that are not MQTT and a
malformed 3.1.1 packet get none, the connection is closed ([MQTT-3.1.4-1] of 3.1.1); a malformed packet of version 5
gets its reason code; an unknown version 0x01 or 0x84; a client id that is not acceptable 0x02 or 0x85; a packet over
the bound 0x95 in version 5 (3.1.1 has no code for it).
"""

import dataclasses
import enum
from typing import Final, NamedTuple
from urllib.parse import quote

__all__ = [
    "CLIENT_ID_BYTES_MAX",
    "CONNECT_BYTES_MAX",
    "Connect",
    "ConnectError",
    "ConnectFault",
    "ConnectScanner",
    "encode_connack",
    "encode_connect",
    "scoped_client_id",
]

CONNECT_BYTES_MAX: Final = 64 * 1024
"""The whole packet, fixed header included. Devices send some 100 bytes; a will of a few KB fits."""
CLIENT_ID_BYTES_MAX: Final = 1024
"""Of the device's own client id. Any server has to take 23 (section 3.1.3.1), brokers take some thousand."""

V311: Final = 4
V5: Final = 5
_CONNECT: Final = 0x10
_NAME: Final = b"\x00\x04MQTT"
_NAME_V31: Final = b"\x00\x06MQIsdp"
_STRING_BYTES_MAX: Final = 0xFFFF
_LENGTH_BYTES_MAX: Final = 4

_FLAG_USER_NAME: Final = 0x80
_FLAG_PASSWORD: Final = 0x40
_FLAG_WILL_RETAIN: Final = 0x20
_FLAG_WILL: Final = 0x04
_FLAG_RESERVED: Final = 0x01
_WILL_QOS_SHIFT: Final = 3
_WILL_QOS_MASK: Final = 0x03
_WILL_QOS_INVALID: Final = 3


class ConnectFault(enum.Enum):
    """Why a CONNECT is refused: the codes of 3.1.1 and of 5 (None: closed without CONNACK)."""

    NOT_MQTT = (None, None)
    MALFORMED = (None, 0x81)
    VERSION = (0x01, 0x84)
    CLIENT_ID = (0x02, 0x85)
    TOO_LARGE = (None, 0x95)
    NOT_AUTHORIZED = (0x05, 0x87)
    UNAVAILABLE = (0x03, 0x88)

    def __init__(self, code_v311: int | None, code_v5: int | None) -> None:
        self.code_v311 = code_v311
        self.code_v5 = code_v5


class ConnectError(ValueError):
    """A CONNECT that is not taken. `level` is the protocol level that the device asked for, 0 when it is not known."""

    def __init__(self, fault: ConnectFault, level: int, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault
        self.level = level
        self.detail = detail


@dataclasses.dataclass(frozen=True, slots=True)
class Connect:
    """A CONNECT packet. `properties`, `will` and the flags are as they came."""

    level: int
    """4 for MQTT 3.1.1, 5 for MQTT 5"""
    flags: int
    """connect flags without those of user name and password"""
    keep_alive_s: int
    properties: bytes
    """with their length in front; empty in 3.1.1, which has none"""
    client_id: str
    will: bytes
    """will properties (version 5), topic and payload; empty without a will"""
    user_name: str | None
    password: bytes | None


class ConnectScanner:
    """Bytes in any pieces to one Connect. Afterwards `rest` holds what followed the packet."""

    __slots__ = ("_held", "rest")

    def __init__(self) -> None:
        self._held = bytearray()
        self.rest = b""

    def feed(self, data: bytes | memoryview) -> Connect | None:
        """The packet once it is complete, None while it is not. Not called again after either end.

        Raises ConnectError as soon as it is clear that no good packet will come of it.
        """
        held = self._held
        room = CONNECT_BYTES_MAX - len(held)
        held += data[:room]
        header = _read_header(held)
        if header is None:
            return None
        packet_bytes = header.body_at + header.body_bytes
        if packet_bytes > CONNECT_BYTES_MAX:
            _refuse_oversized(held, header, packet_bytes)
            return None
        if len(held) < packet_bytes:
            _check_start(held, header)  # garbage that announces a length is found out before it is waited for
            return None
        self.rest = bytes(held[packet_bytes:]) + bytes(data[room:])
        packet = bytes(held[header.body_at : packet_bytes])
        held.clear()
        return _parse_body(packet)


class _Header(NamedTuple):
    body_at: int
    body_bytes: int


def _read_header(held: bytearray) -> _Header | None:
    """The fixed header (section 2.2 of 3.1.1, 2.1 of 5)."""
    if not held:
        return None
    if held[0] != _CONNECT:
        raise ConnectError(ConnectFault.NOT_MQTT, 0, f"the first byte is 0x{held[0]:02x}, not a CONNECT")
    length = 0
    for index in range(_LENGTH_BYTES_MAX):
        if index + 1 >= len(held):
            return None
        byte = held[index + 1]
        length |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return _Header(index + 2, length)
    raise ConnectError(ConnectFault.NOT_MQTT, 0, "the remaining length has more than four bytes")


def _check_start(held: bytearray, header: _Header) -> int | None:
    """See that what is there begins as a CONNECT does; its protocol level, None while that is not there."""
    start = bytes(held[header.body_at : header.body_at + len(_NAME_V31) + 1])
    if start.startswith(_NAME_V31):
        raise ConnectError(ConnectFault.VERSION, 3, "MQTT 3.1 is not spoken here, 3.1.1 and 5 are")
    if start == _NAME_V31[: len(start)]:
        return None
    if start[: len(_NAME)] != _NAME[: len(start)]:
        raise ConnectError(ConnectFault.NOT_MQTT, 0, "the protocol name is not MQTT")
    if len(start) <= len(_NAME):
        return None
    level = start[len(_NAME)]
    if level not in (V311, V5):
        raise ConnectError(
            ConnectFault.VERSION, level, f"protocol level {level} is not spoken here, 4 and 5 are"
        )
    return level


def _refuse_oversized(held: bytearray, header: _Header, packet_bytes: int) -> None:
    """Refuse once it is known how: at the level in version 5, at the length of the client id in 3.1.1."""
    level = _check_start(held, header)
    detail = f"the CONNECT has {packet_bytes} bytes, more than {CONNECT_BYTES_MAX}"
    if level == V5:
        raise ConnectError(ConnectFault.TOO_LARGE, level, detail)
    if level is not None:
        client_id_at = header.body_at + len(_NAME) + 1 + 1 + 2  # level, flags, keep-alive
        if len(held) >= client_id_at + 2:
            too_long = int.from_bytes(held[client_id_at : client_id_at + 2], "big") > CLIENT_ID_BYTES_MAX
            raise ConnectError(ConnectFault.CLIENT_ID if too_long else ConnectFault.TOO_LARGE, level, detail)


class _Body:
    """Reads the fields of one packet; every read takes its bound from what is there."""

    __slots__ = ("_at", "_packet", "level")

    def __init__(self, packet: bytes) -> None:
        self._packet = packet
        self._at = 0
        self.level = 0

    def malformed(self, detail: str) -> ConnectError:
        return ConnectError(
            ConnectFault.MALFORMED if self.level else ConnectFault.NOT_MQTT, self.level, detail
        )

    def take(self, size: int) -> bytes:
        if size > len(self._packet) - self._at:
            raise self.malformed("the CONNECT ends in the middle of a field")
        self._at += size
        return self._packet[self._at - size : self._at]

    def take_number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take_binary(self) -> bytes:
        """Binary data: two bytes of length, then the bytes (section 1.5.6 of 5)."""
        return self.take(self.take_number(2))

    def take_text(self, what: str) -> str:
        """A UTF-8 string (section 1.5.3 of 3.1.1, 1.5.4 of 5): no U+0000, no surrogates."""
        try:
            text = self.take_binary().decode("utf-8")
        except UnicodeDecodeError:
            raise self.malformed(f"the {what} is not UTF-8") from None
        if "\0" in text:
            raise self.malformed(f"the {what} has a character U+0000")
        return text

    def take_properties(self) -> bytes:
        """The properties as they are, with their length in front (section 2.2.2 of 5)."""
        start = self._at
        length = 0
        for index in range(_LENGTH_BYTES_MAX):
            byte = self.take_number(1)
            length |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                self.take(length)
                return self._packet[start : self._at]
        raise self.malformed("the length of the properties has more than four bytes")

    def since(self, start: int) -> bytes:
        return self._packet[start : self._at]

    @property
    def at(self) -> int:
        return self._at

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._packet)


def _parse_body(packet: bytes) -> Connect:
    """Variable header and payload (sections 3.1.2 and 3.1.3)."""
    body = _Body(packet)
    level = _check_start(bytearray(packet), _Header(0, len(packet)))
    if level is None:
        raise ConnectError(ConnectFault.NOT_MQTT, 0, "the CONNECT ends before its protocol level")
    body.take(len(_NAME) + 1)
    body.level = level
    flags = body.take_number(1)
    _check_flags(body, flags)
    keep_alive_s = body.take_number(2)
    properties = body.take_properties() if level == V5 else b""
    client_id = _take_client_id(body)
    will_at = body.at
    if flags & _FLAG_WILL:
        if level == V5:
            body.take_properties()
        body.take_text("will topic")
        body.take_binary()
    will = body.since(will_at)
    user_name = body.take_text("user name") if flags & _FLAG_USER_NAME else None
    password = body.take_binary() if flags & _FLAG_PASSWORD else None
    if not body.is_at_end:
        raise body.malformed("the CONNECT has bytes behind its last field")
    return Connect(
        level,
        flags & ~(_FLAG_USER_NAME | _FLAG_PASSWORD),
        keep_alive_s,
        properties,
        client_id,
        will,
        user_name,
        password,
    )


def _check_flags(body: _Body, flags: int) -> None:
    """Section 3.1.2.3 and those of the single flags."""
    qos = flags >> _WILL_QOS_SHIFT & _WILL_QOS_MASK
    if flags & _FLAG_RESERVED:
        raise body.malformed("the reserved connect flag is set")
    if qos == _WILL_QOS_INVALID:
        raise body.malformed("the QoS of the will is 3")
    if not flags & _FLAG_WILL and (qos or flags & _FLAG_WILL_RETAIN):
        raise body.malformed("flags of a will are set, and there is none")
    if body.level == V311 and flags & _FLAG_PASSWORD and not flags & _FLAG_USER_NAME:
        raise body.malformed(
            "there is a password without a user name"
        )  # [MQTT-3.1.2-22] of 3.1.1; 5 allows it


def _take_client_id(body: _Body) -> str:
    client_id = body.take_text("client id")
    size = len(client_id.encode())
    if size > CLIENT_ID_BYTES_MAX:
        raise ConnectError(
            ConnectFault.CLIENT_ID,
            body.level,
            f"the client id has {size} bytes, more than {CLIENT_ID_BYTES_MAX}",
        )
    return client_id


def encode_connect(connect: Connect) -> bytes:
    """The packet with these fields. Raises ValueError when a string is longer than 65,535 bytes."""
    flags = connect.flags
    payload = [_string(connect.client_id.encode()), connect.will]
    if connect.user_name is not None:
        flags |= _FLAG_USER_NAME
        payload.append(_string(connect.user_name.encode()))
    if connect.password is not None:
        flags |= _FLAG_PASSWORD
        payload.append(_string(connect.password))
    head = _NAME + bytes((connect.level, flags)) + connect.keep_alive_s.to_bytes(2, "big")
    body = b"".join((head, connect.properties, *payload))
    return bytes((_CONNECT,)) + _variable_length(len(body)) + body


def scoped_client_id(realm: str, device: str, client_id: str) -> str:
    """`<realm>/<device>`, and `/<client id>` when the device gave one, each part percent-encoded.

    It is the same on every connection, and since no part holds a `/` of its own no device gets one that begins as
    another's does.
    """
    parts = (realm, device, client_id) if client_id else (realm, device)
    return "/".join(quote(part, safe="") for part in parts)


def encode_connack(fault: ConnectFault, level: int) -> bytes:
    """The CONNACK that says why (section 3.2), empty when the connection is to be closed without one."""
    if level >= V5:
        return b"" if fault.code_v5 is None else bytes((0x20, 3, 0, fault.code_v5, 0))
    return b"" if fault.code_v311 is None or not level else bytes((0x20, 2, 0, fault.code_v311))


def _string(content: bytes) -> bytes:
    if len(content) > _STRING_BYTES_MAX:
        raise ValueError(f"a field of a CONNECT has {len(content)} bytes, more than {_STRING_BYTES_MAX}")
    return len(content).to_bytes(2, "big") + content


def _variable_length(length: int) -> bytes:
    """A variable byte integer (section 2.2.3 of 3.1.1, 1.5.5 of 5)."""
    encoded = bytearray()
    while True:
        length, byte = length >> 7, length & 0x7F
        encoded.append(byte | (0x80 if length else 0))
        if not length:
            return bytes(encoded)
