"""A client that breaks the rules of TLS 1.2 (RFC 5246, RFC 4279): the messages of a real one, rearranged before they are sent."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.faults.conftest import Stage
from tests.support.bad_hellos import (
    PSK_AES128_GCM,
    TLS12 as V12,
    alert_of,
    client_key_exchange,
    hello,
    record,
)
from tests.support.devices import TLS12, TlsDevice, tcp_socket
from tests.support.gateway import Device

UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, ILLEGAL_PARAMETER = 10, 20, 22, 47
DECODE_ERROR, PROTOCOL_VERSION = 50, 70
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, DATA, HEARTBEAT = 20, 21, 22, 23, 24
WARNING, FATAL = 1, 2
USER_CANCELED, CLOSE_NOTIFY = 90, 0
HEADER_BYTES = 5


class Flight(NamedTuple):
    """The second flight of a client, a record each: RFC 5246 section 7.3."""

    key_exchange: bytes
    change_cipher_spec: bytes
    finished: bytes


def flight_of(device: TlsDevice) -> Flight:
    data = device.flight()
    records = []
    while data:
        end = HEADER_BYTES + int.from_bytes(data[3:HEADER_BYTES])
        records.append(data[:end])
        data = data[end:]
    return Flight(*records)


Rearrange = Callable[[Flight], bytes]


def instead(message: bytes, kind: int = HANDSHAKE, version: int = V12) -> Rearrange:
    """Another record in the place of the key exchange."""
    return lambda flight: record(message, version, kind) + flight.change_cipher_spec + flight.finished


def resized(change: int) -> Rearrange:
    """The Finished with some bytes more or less."""
    return lambda f: f.key_exchange + f.change_cipher_spec + record((f.finished + bytes(8))[HEADER_BYTES : len(f.finished) + change], V12)  # fmt: skip


ORDER: dict[str, tuple[Rearrange, int]] = {
    "change_cipher_spec comes first": (lambda f: f.change_cipher_spec + f.key_exchange + f.finished, UNEXPECTED_MESSAGE),
    "Finished without change_cipher_spec": (lambda f: f.key_exchange + f.finished, UNEXPECTED_MESSAGE),
    "the key exchange twice": (lambda f: f.key_exchange * 2 + f.change_cipher_spec + f.finished, UNEXPECTED_MESSAGE),
    "another hello": (lambda _: record(hello(V12, PSK_AES128_GCM)[HEADER_BYTES:], V12), UNEXPECTED_MESSAGE),
    "a hello of another record version": (lambda _: hello(V12, PSK_AES128_GCM), PROTOCOL_VERSION),
    "a certificate": (instead(b"\x0b\0\0\3\0\0\0"), UNEXPECTED_MESSAGE),
    "a message of no type": (instead(b"\x63\0\0\0"), UNEXPECTED_MESSAGE),
    "data": (instead(b"hi", DATA), UNEXPECTED_MESSAGE),
    "a heartbeat": (instead(b"\1\0\1x", HEARTBEAT), UNEXPECTED_MESSAGE),
    "a record of no type": (instead(b"x", 99), UNEXPECTED_MESSAGE),
    "another version in the middle": (instead(b"\x10\0\0\3\0\1d", version=0x0301), PROTOCOL_VERSION),
}  # fmt: skip

FORM: dict[str, tuple[Rearrange, int]] = {
    "a key exchange cut short": (instead(b"\x10\0\0\3\0\5d"), DECODE_ERROR),
    "a key exchange with more behind it": (instead(b"\x10\0\0\4\0\1d!"), DECODE_ERROR),
    "an empty key exchange": (instead(b"\x10\0\0\0"), DECODE_ERROR),
    "a message of 16 MB": (instead(b"\x10\xff\xff\xff" + bytes(100)), ILLEGAL_PARAMETER),
    "a record over the bound (6.2.1)": (instead(bytes(2**14 + 1)), RECORD_OVERFLOW),
    "records without content": (lambda _: record(b"", V12) * 100, UNEXPECTED_MESSAGE),
    "change_cipher_spec of another content": (lambda f: f.key_exchange + record(b"\2", V12, CHANGE_CIPHER_SPEC), UNEXPECTED_MESSAGE),
    "change_cipher_spec of two bytes": (lambda f: f.key_exchange + record(b"\1\1", V12, CHANGE_CIPHER_SPEC), UNEXPECTED_MESSAGE),
    "six warnings": (lambda _: record(bytes([WARNING, USER_CANCELED]), V12, ALERT) * 6, UNEXPECTED_MESSAGE),
    "an alert of no level": (lambda _: record(b"\3\0", V12, ALERT), ILLEGAL_PARAMETER),
    "half an alert": (lambda _: record(b"\2", V12, ALERT), UNEXPECTED_MESSAGE),
}  # fmt: skip


@pytest.mark.parametrize(("rearrange", "alert"), (ORDER | FORM).values(), ids=(ORDER | FORM).keys())
def test_a_flight_that_breaks_a_rule(stage: Stage, rearrange: Rearrange, alert: int) -> None:
    with stage.counts("protocol_error"), TlsDevice(stage.port, stage.device, version=TLS12) as device:
        device.transmit()
        device.take()
        device.sock.sendall(rearrange(flight_of(device)))
        assert alert_of(device.sock) == alert


CANNOT_BE_READ: dict[str, Rearrange] = {
    "change_cipher_spec twice": lambda f: f.key_exchange + f.change_cipher_spec * 2 + f.finished,
    "a Finished with a byte less": resized(-1),
    "a Finished with a byte more": resized(1),
}


@pytest.mark.parametrize("rearrange", CANNOT_BE_READ.values(), ids=CANNOT_BE_READ.keys())
def test_a_proof_that_cannot_be_read(stage: Stage, rearrange: Rearrange) -> None:
    """It is no proof, and what a stranger with the same message gets is the same."""
    alerts = []
    for known in (stage.device, Device("nobody", stage.device.key)):
        outcome = "wrong_key" if known is stage.device else "unknown_identity"
        with stage.counts(outcome), TlsDevice(stage.port, known, version=TLS12) as device:
            device.transmit()
            device.take()
            device.sock.sendall(rearrange(flight_of(device)))
            alerts.append(alert_of(device.sock))
    assert alerts == [BAD_RECORD_MAC, BAD_RECORD_MAC]


@pytest.mark.parametrize(
    "rearrange",
    [
        pytest.param(
            lambda f: (
                b"".join(record(bytes([each]), V12) for each in f.key_exchange[HEADER_BYTES:])
                + f.change_cipher_spec
                + f.finished
            ),
            id="a key exchange in records of one byte",
        ),
        pytest.param(
            lambda f: record(bytes([WARNING, USER_CANCELED]), V12, ALERT) + b"".join(f),
            id="a warning before it",
        ),
    ],
)
def test_what_is_allowed(stage: Stage, rearrange: Rearrange) -> None:
    with stage.counts("ok"), TlsDevice(stage.port, stage.device, version=TLS12) as device:
        device.transmit()
        device.take()
        device.sock.sendall(rearrange(flight_of(device)))
        device.handshake()
        device.send(b"line\n")
        assert device.receive_line() == "ok 1"


def test_close_notify_in_the_middle_is_the_end(stage: Stage) -> None:
    with stage.counts("peer_closed"), TlsDevice(stage.port, stage.device, version=TLS12) as device:
        device.transmit()
        device.take()
        device.sock.sendall(record(bytes([WARNING, CLOSE_NOTIFY]), V12, ALERT))
        assert alert_of(device.sock) is None


@pytest.mark.parametrize(
    ("identity", "outcome"),
    [
        pytest.param(b"", "unknown_identity", id="none"),
        pytest.param(b"\xff\xfe", "unknown_identity", id="not UTF-8"),
        pytest.param(b"a\nb", "unknown_identity", id="a control character"),
        pytest.param("ą".encode() * 65, "unknown_identity", id="of 130 bytes"),
        pytest.param(
            b"d\0x", "wrong_key", id="a NUL: OpenSSL reads up to it, and the key of d has to be proved"
        ),
    ],
)
def test_identities_that_no_device_has(stage: Stage, identity: bytes, outcome: str) -> None:
    with stage.counts(outcome), tcp_socket(stage.port) as sock:
        sock.sendall(hello(V12, PSK_AES128_GCM))
        assert sock.recv(65536)
        sock.sendall(
            client_key_exchange(identity) + record(b"\1", V12, CHANGE_CIPHER_SPEC) + record(bytes(40), V12)
        )
        assert alert_of(sock) == BAD_RECORD_MAC


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda device, _: device.sock.sendall(hello(V12, PSK_AES128_GCM)), id="a plain hello"),
        pytest.param(lambda device, flight: device.sock.sendall(flight.finished), id="the Finished again"),
        pytest.param(lambda device, _: device.sock.sendall(record(b"\1", V12, CHANGE_CIPHER_SPEC)), id="change_cipher_spec"),
        pytest.param(lambda device, _: device.sock.sendall(record(b"\1\0", V12, ALERT)), id="a plain close_notify"),
        pytest.param(lambda device, _: device.sock.sendall(record(bytes(2**14 + 2049), V12, DATA)), id="a record over the bound"),
    ],
)  # fmt: skip
def test_a_session_that_breaks_a_rule(stage: Stage, act: Callable[[TlsDevice, Flight], None]) -> None:
    with stage.counts("ok"), TlsDevice(stage.port, stage.device, version=TLS12) as device:
        device.transmit()
        device.take()
        flight = flight_of(device)
        device.sock.sendall(b"".join(flight))
        device.handshake()
        device.send(b"line\n")
        assert device.receive_line() == "ok 1"
        act(device, flight)
        assert device.receive_to_end() == b""
        assert device.alert in {UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, PROTOCOL_VERSION}
    assert stage.gateway.events("session_failed")[-1]["device"] == "d"
