import dataclasses

import pytest

from gateway.wire.mqtt_connect import (
    CLIENT_ID_BYTES_MAX,
    CONNECT_BYTES_MAX,
    Connect,
    ConnectError,
    ConnectFault,
    ConnectScanner,
    encode_connack,
    encode_connect,
    scoped_client_id,
)

# CONNECT of MQTT 3.1.1 with clean session, keep-alive 60 s, client id "c"
V311 = bytes.fromhex("10 0d 0004 4d515454 04 02 003c 0001 63")
# MQTT 5, clean start, keep-alive 60 s, receive maximum 20, client id "c", will (delay 1 s) on "w" with "gone", QoS 1
V5 = bytes.fromhex("10 22 0004 4d515454 05 0e 003c 03 210014 0001 63 05 1800000001 0001 77 0004 676f6e65")
V5 = bytes([0x10, len(V5) - 2]) + V5[2:]


def scan(packet: bytes) -> Connect:
    connect = ConnectScanner().feed(packet)
    assert connect is not None
    return connect


def refused(packet: bytes) -> ConnectError:
    with pytest.raises(ConnectError) as caught:
        ConnectScanner().feed(packet)
    return caught.value


def packet(body: bytes) -> bytes:
    length = len(body)
    encoded = bytearray()
    while True:
        length, byte = length >> 7, length & 0x7F
        encoded.append(byte | (0x80 if length else 0))
        if not length:
            return b"\x10" + bytes(encoded) + body


def text(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content


def test_version_311() -> None:
    connect = scan(V311)
    assert connect == Connect(4, 0x02, 60, b"", "c", b"", None, None)
    assert encode_connect(connect) == V311


def test_version_5_keeps_properties_and_will() -> None:
    connect = scan(V5)
    assert (connect.level, connect.keep_alive_s, connect.properties) == (5, 60, bytes.fromhex("03210014"))
    assert connect.will == bytes.fromhex("05 1800000001 0001 77 0004 676f6e65")
    assert encode_connect(connect) == V5


def test_user_name_and_password_are_set_and_taken_out() -> None:
    named = dataclasses.replace(scan(V311), user_name="meter-7", password=b"secret")
    encoded = encode_connect(named)
    assert encoded[9] == 0xC2
    assert encoded.endswith(text(b"meter-7") + text(b"secret"))
    assert scan(encoded) == named
    assert encode_connect(dataclasses.replace(named, user_name=None, password=None)) == V311


def test_what_follows_is_kept() -> None:
    scanner = ConnectScanner()
    assert scanner.feed(V311[:5]) is None
    assert scanner.feed(V311[5:] + b"\xc0\x00") is not None
    assert scanner.rest == b"\xc0\x00"


def test_byte_by_byte() -> None:
    scanner = ConnectScanner()
    for index in range(len(V5) - 1):
        assert scanner.feed(V5[index : index + 1]) is None
    assert scanner.feed(V5[-1:]) == scan(V5)


class TestGarbage:
    @pytest.mark.parametrize(
        "data",
        [
            b"GET / HTTP/1.1\r\n",
            b"\x00",
            b"\x20\x02\x00\x00",  # a CONNACK
            b"\x11" + V311[1:],  # reserved flags of the fixed header
            b"\x10\xff\xff\xff\xff\x7f",  # a length of five bytes
            b"\x10\x7f\x00\x04MQTX",
            b"\x10\x7f\x00\x05",
            b"\x10\x00",
            b"\x10\x06\x00\x04MQTT",
        ],
    )
    def test_is_closed_without_a_word(self, data: bytes) -> None:
        fault = refused(data)
        assert fault.fault is ConnectFault.NOT_MQTT
        assert encode_connack(fault.fault, fault.level) == b""

    def test_is_found_before_its_length_is_waited_for(self) -> None:
        assert refused(b"\x10\xff\x7fhello").fault is ConnectFault.NOT_MQTT


class TestVersion:
    def test_31(self) -> None:
        fault = refused(packet(b"\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x01c"))
        assert encode_connack(fault.fault, fault.level) == b"\x20\x02\x00\x01"

    @pytest.mark.parametrize(("level", "connack"), [(3, b"\x20\x02\x00\x01"), (6, b"\x20\x03\x00\x84\x00")])
    def test_unknown(self, level: int, connack: bytes) -> None:
        fault = refused(V311[:8] + bytes([level]) + V311[9:])
        assert fault.fault is ConnectFault.VERSION
        assert encode_connack(fault.fault, fault.level) == connack


HEAD = b"\x00\x04MQTT"


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        (0x03, b"\x00\x01c"),  # reserved flag
        (0x0A, b"\x00\x01c"),  # QoS without a will
        (0x22, b"\x00\x01c"),  # retain without a will
        (0x1E, b"\x00\x01c\x00\x01w\x00\x01x"),  # QoS 3
        (0x42, b"\x00\x01c\x00\x01p"),  # password without a user name
        (0x02, b"\x00\x02c"),  # cut off
        (0x02, b"\x00"),
        (0x02, b""),
        (0x02, b"\x00\x01cx"),  # a byte too many
        (0x02, b"\x00\x01\xff"),  # not UTF-8
        (0x02, b"\x00\x03\xed\xa0\x80"),  # a surrogate
        (0x02, b"\x00\x01\x00"),  # U+0000
        (0x82, b"\x00\x01c\x00\x05user"),
        (0x06, b"\x00\x01c\x00\x01w"),  # a will without payload
    ],
)
def test_malformed(flags: int, payload: bytes) -> None:
    fault = refused(packet(HEAD + b"\x04" + bytes([flags]) + b"\x00\x3c" + payload))
    assert fault.fault is ConnectFault.MALFORMED
    assert encode_connack(fault.fault, fault.level) == b""
    if flags != 0x42:  # version 5 allows that
        fault = refused(packet(HEAD + b"\x05" + bytes([flags]) + b"\x00\x3c\x00" + payload))
        assert encode_connack(fault.fault, fault.level) == b"\x20\x03\x00\x81\x00"


def test_properties_whose_length_lies() -> None:
    assert refused(packet(HEAD + b"\x05\x02\x00\x3c\x7f\x00\x01c")).fault is ConnectFault.MALFORMED
    assert (
        refused(packet(HEAD + b"\x05\x02\x00\x3c\xff\xff\xff\xff\x01" + bytes(9))).fault
        is ConnectFault.MALFORMED
    )


class TestBounds:
    @pytest.mark.parametrize(("level", "connack"), [(4, b"\x20\x02\x00\x02"), (5, b"\x20\x03\x00\x85\x00")])
    def test_a_long_client_id(self, level: int, connack: bytes) -> None:
        properties = b"\x00" if level == 5 else b""
        body = HEAD + bytes([level, 2, 0, 60]) + properties
        assert scan(packet(body + text(b"i" * CLIENT_ID_BYTES_MAX))).client_id == "i" * CLIENT_ID_BYTES_MAX
        fault = refused(packet(body + text(b"i" * (CLIENT_ID_BYTES_MAX + 1))))
        assert encode_connack(fault.fault, fault.level) == connack

    @pytest.mark.parametrize(("level", "connack"), [(4, b"\x20\x02\x00\x02"), (5, b"\x20\x03\x00\x95\x00")])
    def test_a_client_id_of_64_kilobytes(self, level: int, connack: bytes) -> None:
        whole = packet(
            HEAD + bytes([level, 2, 0, 60]) + (b"\x00" if level == 5 else b"") + text(b"i" * 0xFFFF)
        )
        scanner = ConnectScanner()
        taken = next(size for size in range(1, 20) if self.is_refused(whole[:size]))
        assert scanner.feed(whole[: taken - 1]) is None
        with pytest.raises(ConnectError) as caught:
            scanner.feed(whole[taken - 1 :])
        assert encode_connack(caught.value.fault, caught.value.level) == connack

    @staticmethod
    def is_refused(start: bytes) -> bool:
        try:
            ConnectScanner().feed(start)
        except ConnectError:
            return True
        return False

    def test_a_large_will_of_311_has_no_code(self) -> None:
        fault = refused(packet(HEAD + b"\x04\x06\x00\x3c" + text(b"c") + text(b"w") + text(bytes(0xFFFF))))
        assert fault.fault is ConnectFault.TOO_LARGE
        assert encode_connack(fault.fault, fault.level) == b""

    def test_memory(self) -> None:
        scanner = ConnectScanner()
        assert scanner.feed(packet(HEAD + b"\x04\x06\x00\x3c" + bytes(CONNECT_BYTES_MAX - 20))[:-100]) is None
        assert len(scanner._held) <= CONNECT_BYTES_MAX


class TestClientId:
    def test_is_scoped(self) -> None:
        assert scoped_client_id("default", "meter-7", "") == "default/meter-7"
        assert scoped_client_id("default", "meter-7", "app 1") == "default/meter-7/app%201"

    def test_no_device_gets_anothers(self) -> None:
        assert scoped_client_id("r", "a/b", "") == "r/a%2Fb"
        assert scoped_client_id("r", "a", "b") == "r/a/b"
        assert scoped_client_id("r", "a", "../b") == "r/a/..%2Fb"
        assert scoped_client_id("r", "a%2Fb", "") == "r/a%252Fb"
