import pytest

from gateway.wire.framing import Oversized, Truncated
from gateway.wire.framings import FRAMINGS
from gateway.wire.length_framing import LengthDecoder, encode_length

TOO_LONG = Oversized.FRAME


def test_frames() -> None:
    decoder = LengthDecoder(2, 100)
    assert decoder.feed(b"\x00\x03one\x00\x00\x00\x05thr") == [b"one", b""]
    assert decoder.feed(memoryview(b"ee")) == [b"three"]
    assert decoder.finish() == []


def test_four_bytes_of_length() -> None:
    assert LengthDecoder(4, 70_000).feed(b"\x00\x01\x00\x00" + bytes(65_536)) == [bytes(65_536)]


def test_a_prefix_in_two_pieces() -> None:
    decoder = LengthDecoder(2, 100)
    assert decoder.feed(b"\x00") == []
    assert decoder.feed(b"\x02hi") == [b"hi"]


def test_a_frame_of_nothing_whose_prefix_comes_in_pieces() -> None:
    decoder = LengthDecoder(2, 100)
    assert decoder.feed(b"\x00") == []
    assert decoder.feed(b"\x00") == [b""]


class TestBound:
    def test_a_longer_frame_is_told_at_once_and_skipped(self) -> None:
        decoder = LengthDecoder(2, 3)
        assert decoder.feed(b"\x00\x03abc\x00\x04") == [b"abc", TOO_LONG]
        assert decoder.feed(b"wxy") == []
        assert decoder.feed(b"z\x00\x01b") == [b"b"]

    def test_four_gigabytes_cost_nothing(self) -> None:
        decoder = LengthDecoder(4, 65_536)
        assert decoder.feed(b"\xff\xff\xff\xff") == [TOO_LONG]
        chunk = bytes(1 << 20)
        for _ in range(4095):
            assert decoder.feed(chunk) == []
        assert len(decoder._held) == 0
        assert decoder.feed(chunk[1:] + b"\x00\x00\x00\x02ok") == [b"ok"]

    def test_what_is_cut_off_in_a_frame_that_was_too_long_is_answered_for(self) -> None:
        decoder = LengthDecoder(2, 3)
        assert decoder.feed(b"\x00\x09abc") == [TOO_LONG]
        assert decoder.finish() == []


@pytest.mark.parametrize("data", [b"\x00", b"\x00\x02", b"\x00\x02x"])
def test_an_end_within_a_frame(data: bytes) -> None:
    decoder = LengthDecoder(2, 100)
    assert decoder.feed(data) == []
    assert decoder.finish() == [Truncated.FRAME]
    assert decoder.finish() == []


def test_encoding() -> None:
    assert encode_length(2, b"ok 1") == b"\x00\x04ok 1"
    assert FRAMINGS["length32"].encode(b"a\nb") == b"\x00\x00\x00\x03a\nb"
    assert len(encode_length(2, bytes(0xFFFF))) == 0xFFFF + 2


def test_a_content_that_the_prefix_cannot_count() -> None:
    with pytest.raises(
        ValueError, match="65536 bytes do not fit on a route with framing = length16: 65535 do"
    ):
        FRAMINGS["length16"].encode(bytes(0x10000))
