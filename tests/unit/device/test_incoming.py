"""What a gateway says to a device."""

import pytest

from gateway.device.incoming import Answer, Command, decode_incoming


@pytest.mark.parametrize(
    ("frame", "value"),
    [
        (b"ok 1", Answer(1)),
        (b"error 12 too_long", Answer(12, "too_long")),
        (b"reply 3 a b", Answer(3, None, b"a b")),
        (b"reply 3 ", Answer(3, None, b"")),
        (b"command 0192-abc set 1 2", Command("0192-abc", b"set 1 2")),
        (b"command x ", Command("x", b"")),
    ],
)
def test_frames(frame: bytes, value: object) -> None:
    assert decode_incoming(frame) == value


@pytest.mark.parametrize(
    "frame",
    [b"", b"ok", b"ok x", b"ok 1 2", b"error 1", b"hello 1", b"ok -1", b"command", b"ok " + b"9" * 30],
)
def test_what_no_gateway_sends(frame: bytes) -> None:
    with pytest.raises(ValueError, match="neither"):
        decode_incoming(frame)
