"""What connections do under load: the cipher suites of the tables, and the kinds of work."""

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CipherSuite:
    """As the tables call it and as OpenSSL does."""

    label: str
    name: str


PSK_GCM = CipherSuite("TLS 1.2 PSK-AES128-GCM-SHA256", "PSK-AES128-GCM-SHA256")
ECDHE_CHACHA = CipherSuite("TLS 1.2 ECDHE-PSK-CHACHA20-POLY1305", "ECDHE-PSK-CHACHA20-POLY1305")
TLS13_GCM = CipherSuite("TLS 1.3 AES-128-GCM, psk_dhe_ke", "TLS_AES_128_GCM_SHA256")
SUITES = (PSK_GCM, ECDHE_CHACHA, TLS13_GCM)

SMALL_FLEET = 10_000
"""Devices in the registry where its size is not what is measured."""
PEER_DEVICES = 1000
"""Lines in the file of keys of Mosquitto and stunnel, unless their number is what is measured."""
FAR_APART = 7919
"""A stride by which devices come in no order that helps a look-up; a prime, so that all come before one comes again."""


class Work(enum.Enum):
    """What one connection does between its handshake and its end."""

    HANDSHAKE = None
    ECHO = "echo"
    """64 bytes, and waits for the same"""
    LINE = "line"
    """A line of 64 bytes, and waits for its acknowledgement"""
