"""Names of what OpenSSL's message callback shows, and the text of `openssl s_client -msg` made of it."""

from typing import Final

__all__ = [
    "alert_name", "describe_message", "group_name", "message_name", "psk_mode_name", "version_name",
]  # fmt: skip

_VERSIONS: Final = {0x0301: "TLS 1.0", 0x0302: "TLS 1.1", 0x0303: "TLS 1.2", 0x0304: "TLS 1.3"}
_CONTENT_TYPES: Final = {
    0x14: "ChangeCipherSpec",
    0x15: "Alert",
    0x16: "Handshake",
    0x17: "ApplicationData",
    0x100: "RecordHeader",
    0x101: "InnerContent",
}
"""Those of the record layer (RFC 8446 section 5.1), and two of OpenSSL's own."""
_HANDSHAKES: Final = {
    0: "HelloRequest",
    1: "ClientHello",
    2: "ServerHello",
    4: "NewSessionTicket",
    5: "EndOfEarlyData",
    8: "EncryptedExtensions",
    11: "Certificate",
    12: "ServerKeyExchange",
    13: "CertificateRequest",
    14: "ServerHelloDone",
    15: "CertificateVerify",
    16: "ClientKeyExchange",
    20: "Finished",
    22: "CertificateStatus",
    24: "KeyUpdate",
}
_ALERTS: Final = {
    0: "close_notify",
    10: "unexpected_message",
    20: "bad_record_mac",
    22: "record_overflow",
    40: "handshake_failure",
    42: "bad_certificate",
    46: "certificate_unknown",
    47: "illegal_parameter",
    48: "unknown_ca",
    50: "decode_error",
    51: "decrypt_error",
    70: "protocol_version",
    71: "insufficient_security",
    80: "internal_error",
    86: "inappropriate_fallback",
    90: "user_canceled",
    100: "no_renegotiation",
    109: "missing_extension",
    110: "unsupported_extension",
    112: "unrecognized_name",
    115: "unknown_psk_identity",
    116: "certificate_required",
    120: "no_application_protocol",
}
_GROUPS: Final = {
    23: "secp256r1", 24: "secp384r1", 25: "secp521r1", 29: "x25519", 30: "x448", 26: "brainpoolP256r1",
    27: "brainpoolP384r1", 28: "brainpoolP512r1", 256: "ffdhe2048", 257: "ffdhe3072", 258: "ffdhe4096", 259: "ffdhe6144",
    260: "ffdhe8192", 41: "curveSM2", 4587: "SecP256r1MLKEM768", 4588: "X25519MLKEM768", 4589: "SecP384r1MLKEM1024",
}  # fmt: skip
"""Those of RFC 8446 section 4.2.7, Brainpool's of RFC 7027, and the hybrid that OpenSSL offers first."""
_PSK_MODES: Final = {0: "psk_ke", 1: "psk_dhe_ke"}
_LEVELS: Final = {1: "warning", 2: "fatal"}
_HEADER: Final = 0x100
_INNER: Final = 0x101
_ROW_BYTES: Final = 16


def alert_name(code: int) -> str:
    """The name of an alert description (RFC 8446 section 6)."""
    return _ALERTS.get(code, f"alert {code}")


def version_name(code: int) -> str:
    """The name of a protocol version; `0x1234` for one that is none (GREASE values of RFC 8701 too)."""
    return _VERSIONS.get(code) or f"0x{code:04X}"


def group_name(code: int) -> str:
    """The name of a group of key exchange (RFC 8446 section 4.2.7), or its number."""
    return _GROUPS.get(code) or f"0x{code:04X}"


def psk_mode_name(code: int) -> str:
    """The name of a mode of key exchange with a PSK (RFC 8446 section 4.2.9), or its number."""
    return _PSK_MODES.get(code) or f"0x{code:02X}"


def message_name(content_type: int, data: bytes) -> str:
    """What a message is: `ClientHello`, `Alert, fatal decrypt_error`, `ChangeCipherSpec`."""
    detail = _detail(content_type, data).removeprefix(", ")
    kind = _CONTENT_TYPES.get(content_type, f"type {content_type:#x}")
    return detail if kind == "Handshake" and detail else ", ".join(filter(None, (kind, detail)))


def describe_message(*, sent: bool, version: int, content_type: int, data: bytes) -> str:
    """One message as `openssl s_client -msg` prints it: a line that names it, then its bytes in rows of sixteen."""
    arrow = ">>>" if sent else "<<<"
    spoken = _VERSIONS.get(version, "TLS")
    kind = _CONTENT_TYPES.get(content_type, f"type {content_type:#x}")
    lines = [f"{arrow} {spoken}, {kind} [length {len(data):04x}]{_detail(content_type, data)}"]
    lines += ["    " + data[start : start + _ROW_BYTES].hex(" ") for start in range(0, len(data), _ROW_BYTES)]
    return "\n".join(lines)


def _detail(content_type: int, data: bytes) -> str:
    if content_type == 0x16 and data:  # noqa: PLR2004 -- Handshake
        return f", {_HANDSHAKES.get(data[0], f'message {data[0]}')}"
    if content_type == 0x15 and len(data) == 2:  # noqa: PLR2004 -- Alert: level and description
        return f", {_LEVELS.get(data[0], str(data[0]))} {alert_name(data[1])}"
    if content_type in (_HEADER, _INNER) and data:
        return f", {_CONTENT_TYPES.get(data[0], f'type {data[0]:#x}')}"
    return ""
