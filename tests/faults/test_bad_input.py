"""What is not a handshake: it ends with the right alert or a close, is counted, and disturbs nobody."""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable

import pytest

from gateway.tls.openssl import TlsVersion
from tests.faults.conftest import HANDSHAKE_TIMEOUT_S, TICK_S, Stage
from tests.support.bad_hellos import (
    HTTP_REQUEST,
    PSK_AES128_GCM,
    RSA_AES128_GCM,
    SSL2_HELLO,
    SSL3,
    TLS10,
    TLS12,
    alert_of,
    client_key_exchange,
    hello,
    long_hello,
    record,
)
from tests.support.devices import TLS12 as V12, TLS13 as V13, Refused, TlsDevice, tcp_socket
from tests.support.gateway import Device
from tests.support.raw_hello import client_hello

UNEXPECTED_MESSAGE, BAD_RECORD_MAC, HANDSHAKE_FAILURE, DECODE_ERROR, PROTOCOL_VERSION, UNKNOWN_PSK_IDENTITY = (
    10, 20, 40, 50, 70, 115,
)  # fmt: skip
LATE_S = TICK_S + 1
"""How late a deadline may be kept on a busy machine."""


def say(stage: Stage, data: bytes) -> int | None:
    """Send these bytes and wait for the end; the alert, if any."""
    with tcp_socket(stage.port) as sock:
        sock.sendall(data)
        return alert_of(sock)


@pytest.mark.parametrize(
    ("data", "alert", "reason"),
    [
        pytest.param(b"\xde\xad\xbe\xef" * 64, None, "not TLS", id="garbage"),
        pytest.param(secrets.token_bytes(5).replace(b"\x16", b"\0"), None, "not TLS", id="a few random bytes"),
        pytest.param(HTTP_REQUEST, None, "plain HTTP", id="HTTP"),
        pytest.param(SSL2_HELLO, None, "SSL 2.0", id="SSL 2.0"),
        pytest.param(hello(SSL3, PSK_AES128_GCM), PROTOCOL_VERSION, "version too low", id="SSL 3.0"),
        pytest.param(hello(TLS10, PSK_AES128_GCM), PROTOCOL_VERSION, "unsupported protocol", id="TLS 1.0"),
        pytest.param(record(b"\x02\x28", kind=21), UNEXPECTED_MESSAGE, "before any ClientHello", id="an alert"),
        pytest.param(record(b"hello", kind=23), UNEXPECTED_MESSAGE, "before any ClientHello", id="data"),
        pytest.param(record(b"\x0e\0\0\0"), UNEXPECTED_MESSAGE, "instead of a ClientHello", id="another message"),
        pytest.param(record(b"\x01\0\0\x05\x03\x03abc"), DECODE_ERROR, "malformed", id="a hello cut short"),
        pytest.param(long_hello(40_000), DECODE_ERROR, "more than 16384 bytes", id="a hello of 40 KB"),
    ],
)  # fmt: skip
def test_what_is_no_handshake_is_refused(stage: Stage, data: bytes, alert: int | None, reason: str) -> None:
    with stage.counts("protocol_error"):
        assert say(stage, data) == alert
    assert reason in stage.last_failure()["reason"]


def test_no_common_suite_is_explained_in_the_log(stage: Stage) -> None:
    with stage.counts("no_shared_cipher"):
        assert say(stage, hello(TLS12, RSA_AES128_GCM)) == HANDSHAKE_FAILURE
    failure = stage.last_failure()
    assert failure["offered"] == ["AES128-GCM-SHA256"]
    assert "PSK-AES128-GCM-SHA256" in failure["allowed"]
    assert "ECDHE-PSK-CHACHA20-POLY1305" in failure["allowed"]


@pytest.mark.parametrize("size", [129, 200, 255])
def test_an_identity_that_nobody_can_have_is_unknown_in_1_2(stage: Stage, size: int) -> None:
    with stage.counts("unknown_identity"), pytest.raises(Refused) as refused:
        TlsDevice.connect(stage.port, Device("x" * size, stage.device.key), version=V12)
    assert refused.value.alert == BAD_RECORD_MAC
    assert stage.last_failure()["identity"] == "x" * size


def test_an_identity_of_5000_bytes_ends_the_handshake_in_1_2(stage: Stage) -> None:
    with stage.counts("protocol_error"), tcp_socket(stage.port) as sock:
        sock.sendall(hello(TLS12, PSK_AES128_GCM))
        assert sock.recv(65536)
        sock.sendall(client_key_exchange(b"x" * 5_000))
        assert alert_of(sock) is not None


@pytest.mark.parametrize("size", [129, 200, 5_000])
def test_an_identity_that_nobody_can_have_is_unknown_in_1_3(stage: Stage, size: int) -> None:
    with stage.counts("unknown_identity"):
        assert say(stage, client_hello([Device("x" * size, stage.device.key)])) == UNKNOWN_PSK_IDENTITY
    assert "1 to 128 bytes" in stage.last_failure()["reason"]


@pytest.mark.parametrize("version", [V12, V13], ids=["1.2", "1.3"])
def test_a_handshake_in_pieces_of_one_byte_works(stage: Stage, version: TlsVersion) -> None:
    with stage.counts("ok"), TlsDevice(stage.port, stage.device, version=version) as device:
        device.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not device.version:
            for at in device.flight():
                device.sock.sendall(bytes([at]))
            device.take()
        device.transmit()
        device.send(b"hello\n")
        assert device.receive_line() == "ok 1"


def test_silence_ends_in_time(stage: Stage) -> None:
    with stage.counts("timeout"):
        assert HANDSHAKE_TIMEOUT_S <= until_closed(stage, lambda _: None) < HANDSHAKE_TIMEOUT_S + LATE_S
    assert stage.last_failure()["reason"] == "no handshake within 1 s"


def test_trickling_bytes_do_not_put_the_deadline_off(stage: Stage) -> None:
    pieces = iter(hello(TLS12, PSK_AES128_GCM))

    def trickle(sock: socket.socket) -> None:
        sock.sendall(bytes([next(pieces)]))

    with stage.counts("timeout"):
        assert HANDSHAKE_TIMEOUT_S <= until_closed(stage, trickle) < HANDSHAKE_TIMEOUT_S + LATE_S


def test_silence_in_the_middle_of_a_handshake_ends_in_time(stage: Stage) -> None:
    said = iter([hello(TLS12, PSK_AES128_GCM)])

    def hello_only(sock: socket.socket) -> None:
        for data in said:
            sock.sendall(data)
            assert sock.recv(65536)

    with stage.counts("timeout"):
        assert HANDSHAKE_TIMEOUT_S <= until_closed(stage, hello_only) < HANDSHAKE_TIMEOUT_S + LATE_S


def until_closed(stage: Stage, meanwhile: Callable[[socket.socket], None]) -> float:
    """Connect, do something every 50 ms, and give the seconds until the gateway ended the connection."""
    began = time.monotonic()
    with tcp_socket(stage.port) as sock, contextlib.suppress(ConnectionError):
        while True:
            meanwhile(sock)
            sock.settimeout(0.05)
            try:
                if not sock.recv(65536):
                    break
            except TimeoutError:
                sock.settimeout(10)
    return time.monotonic() - began


def test_garbage_in_a_session_ends_it_with_an_alert(stage: Stage) -> None:
    for version in (V12, V13):
        with stage.counts("ok"), TlsDevice.connect(stage.port, stage.device, version=version) as device:
            device.send(b"good\n")
            assert device.receive_line() == "ok 1"
            device.sock.sendall(record(secrets.token_bytes(64), TLS12, kind=23))
            assert device.receive_to_end() == b""
            assert device.alert == BAD_RECORD_MAC
    stage.gateway.wait_for_event("session_failed", device="d")
