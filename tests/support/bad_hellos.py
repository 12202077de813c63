"""Bytes that a gateway gets to see and should not, and the plain parts of a TLS 1.2 handshake by hand (RFC 5246)."""

import secrets
import socket

__all__ = [
    "ALERT",
    "HTTP_REQUEST",
    "PSK_AES128_GCM",
    "RSA_AES128_GCM",
    "SSL2_HELLO",
    "SSL3",
    "TLS10",
    "TLS12",
    "alert_of",
    "client_key_exchange",
    "hello",
    "long_hello",
    "record",
]

SSL3, TLS10, TLS12 = 0x0300, 0x0301, 0x0303
PSK_AES128_GCM, RSA_AES128_GCM = 0x00A8, 0x009C
ALERT, HANDSHAKE = 21, 22
CLIENT_HELLO, CLIENT_KEY_EXCHANGE = 1, 16
PADDING = 21

HTTP_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n"
SSL2_HELLO = bytes.fromhex("802b 01 0002 0012 0000 0010") + b"\x07\x00\xc0" * 6 + bytes(16)


def hello(version: int, suite: int) -> bytes:
    """A ClientHello of this version that offers one suite and has no extensions."""
    body = (
        version.to_bytes(2)
        + secrets.token_bytes(32)
        + _sized(b"", 1)
        + _sized(suite.to_bytes(2))
        + _sized(b"\0", 1)
    )
    return record(bytes([CLIENT_HELLO]) + _sized(body, 3), min(version, TLS10))


def long_hello(size: int) -> bytes:
    """A ClientHello of good form that is padded to more than `size` bytes, over several records if need be."""
    whole = hello(TLS12, PSK_AES128_GCM)[5:]
    body = whole[4:] + _sized(PADDING.to_bytes(2) + _sized(bytes(size)))
    message = bytes([CLIENT_HELLO]) + _sized(body, 3)
    return b"".join(record(message[at : at + 8192]) for at in range(0, len(message), 8192))


def client_key_exchange(identity: bytes) -> bytes:
    """The message of RFC 4279 section 2 that names the identity."""
    return record(bytes([CLIENT_KEY_EXCHANGE]) + _sized(_sized(identity), 3), TLS12)


def record(fragment: bytes, version: int = TLS10, kind: int = HANDSHAKE) -> bytes:
    """One plain record, however long."""
    return bytes([kind]) + version.to_bytes(2) + _sized(fragment)


def alert_of(sock: socket.socket) -> int | None:
    """Read to the end; the fatal alert in what came, None without one."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    at, alert = 0, None
    while at < len(received):
        size = int.from_bytes(received[at + 3 : at + 5])
        if received[at] == ALERT and size == 2 and received[at + 5] == 2:
            alert = received[at + 6]
        at += 5 + size
    return alert


def _sized(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size) + data
