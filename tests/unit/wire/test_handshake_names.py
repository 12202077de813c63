"""The text of a handshake trace."""

import pytest

from gateway.wire.handshake_names import alert_name, describe_message


@pytest.mark.parametrize(
    ("sent", "version", "content_type", "data", "text"),
    [
        (
            True,
            0x0304,
            0x16,
            b"\x01\x00\x00\x00",
            ">>> TLS 1.3, Handshake [length 0004], ClientHello\n    01 00 00 00",
        ),
        (
            False,
            0x0303,
            0x15,
            b"\x02\x28",
            "<<< TLS 1.2, Alert [length 0002], fatal handshake_failure\n    02 28",
        ),
        (False, 0x0303, 0x14, b"\x01", "<<< TLS 1.2, ChangeCipherSpec [length 0001]\n    01"),
        (
            True,
            0x0301,
            0x100,
            b"\x16\3\1\0\4",
            ">>> TLS 1.0, RecordHeader [length 0005], Handshake\n    16 03 01 00 04",
        ),
        (False, 0x0304, 0x101, b"\x17", "<<< TLS 1.3, InnerContent [length 0001], ApplicationData\n    17"),
        (False, 0x9999, 0x99, b"", "<<< TLS, type 0x99 [length 0000]"),
        (False, 0x0303, 0x16, b"\xfe", "<<< TLS 1.2, Handshake [length 0001], message 254\n    fe"),
        (False, 0x0303, 0x15, b"\x02\xfe", "<<< TLS 1.2, Alert [length 0002], fatal alert 254\n    02 fe"),
    ],
)
def test_one_message(sent: bool, version: int, content_type: int, data: bytes, text: str) -> None:
    assert describe_message(sent=sent, version=version, content_type=content_type, data=data) == text


def test_bytes_stand_in_rows_of_sixteen() -> None:
    rows = describe_message(sent=True, version=0x0304, content_type=0x16, data=bytes(40)).splitlines()
    assert [len(row.split()) for row in rows[1:]] == [16, 16, 8]


def test_alerts() -> None:
    assert alert_name(51) == "decrypt_error"
    assert alert_name(255) == "alert 255"
