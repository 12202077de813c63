import sys

import pytest

from gateway.wire.framing import (
    LineDecoder,
    Oversized,
    Reason,
    encode_command,
    encode_error,
    encode_line,
    encode_ok,
    encode_reply,
    split_message_id,
)

TOO_LONG = Oversized.FRAME


def test_lines() -> None:
    decoder = LineDecoder(100)
    assert decoder.feed(b"one\ntwo\r\n\n\r\nthr") == [b"one", b"two", b"", b""]
    assert decoder.feed(memoryview(b"ee")) == []
    assert decoder.feed(b"\n") == [b"three"]
    assert decoder.finish() == []


def test_only_one_carriage_return_belongs_to_the_line_end() -> None:
    assert LineDecoder(100).feed(b"a\r\r\nb\rc\n") == [b"a\r", b"b\rc"]


def test_a_line_end_in_two_pieces() -> None:
    decoder = LineDecoder(100)
    assert decoder.feed(b"a\r") == []
    assert decoder.feed(b"\nb") == [b"a"]


def test_an_unterminated_rest_is_a_frame_at_the_end() -> None:
    decoder = LineDecoder(100)
    assert decoder.feed(b"a\nb") == [b"a"]
    assert decoder.finish() == [b"b"]
    assert decoder.finish() == []


def test_bytes_are_taken_as_they_are() -> None:
    assert LineDecoder(100).feed(b"\x00\xff\x1b\n") == [b"\x00\xff\x1b"]


class TestBound:
    def test_counts_the_frame_without_its_line_end(self) -> None:
        assert LineDecoder(3).feed(b"abc\nabc\r\nabcd\n") == [b"abc", b"abc", TOO_LONG]

    def test_room_for_the_carriage_return_of_an_unfinished_frame(self) -> None:
        decoder = LineDecoder(3)
        assert decoder.feed(b"abc\r") == []
        assert decoder.feed(b"\n") == [b"abc"]
        assert decoder.feed(b"abc\r") == []
        assert decoder.feed(b"d\n") == [TOO_LONG]

    def test_carriage_return_without_line_feed_counts_at_the_end(self) -> None:
        decoder = LineDecoder(3)
        assert decoder.feed(b"abc\r") == []
        assert decoder.finish() == [TOO_LONG]

    def test_too_long_is_said_once_and_at_once(self) -> None:
        decoder = LineDecoder(3)
        assert decoder.feed(b"abcd") == [TOO_LONG]
        assert decoder.feed(b"efgh" * 1000) == []
        assert decoder.feed(b"ijkl\nok\n") == [b"ok"]

    def test_too_long_and_never_finished(self) -> None:
        decoder = LineDecoder(3)
        assert decoder.feed(b"abcd") == [TOO_LONG]
        assert decoder.finish() == []

    def test_a_frame_without_end_holds_no_memory(self) -> None:
        decoder = LineDecoder(1000)
        frames = [frame for _ in range(1000) for frame in decoder.feed(b"x" * 100)]
        assert frames == [TOO_LONG]
        assert sys.getsizeof(decoder._rest) < 200

    def test_a_finished_frame_holds_no_memory(self) -> None:
        decoder = LineDecoder(100_000)
        for _ in range(100):
            assert decoder.feed(b"x" * 1000) == []
        assert decoder.feed(b"\n") == [b"x" * 100_000]
        assert sys.getsizeof(decoder._rest) < 200


class TestAnswers:
    def test_ok(self) -> None:
        assert encode_ok(12) == b"ok 12"

    @pytest.mark.parametrize("reason", Reason)
    def test_error(self, reason: Reason) -> None:
        assert encode_error(1, reason) == b"error 1 " + reason.value.encode()

    def test_the_reasons_of_the_contract(self) -> None:
        words = "too_long invalid full rate_limited refused unavailable stopping"
        assert [str(reason) for reason in Reason] == words.split()

    def test_line_to_the_device(self) -> None:
        assert encode_line(b"command 7 reboot") == b"command 7 reboot\n"

    @pytest.mark.parametrize("payload", [b"a\nb", b"a\n", b"a\r"])
    def test_line_break_is_refused(self, payload: bytes) -> None:
        with pytest.raises(ValueError, match="line break"):
            encode_line(payload)


class TestMessageIds:
    def test_the_first_token(self) -> None:
        assert split_message_id(b"m-17 21.5 C") == ("m-17", b"21.5 C")
        assert split_message_id(b"m-17 ") == ("m-17", b"")
        assert split_message_id(b"~  x") == ("~", b" x")

    @pytest.mark.parametrize(
        "frame",
        [
            b"",
            b" ",
            b" payload",
            b"no-space",
            b"x" * 65 + b" payload",
            b"a\tb c",
            b"\xc3\xa4 c",
            b"a\x7f c",
            b"a\nb c",
        ],
    )
    def test_what_is_no_id(self, frame: bytes) -> None:
        with pytest.raises(ValueError, match="1 to 64 visible ASCII"):
            split_message_id(frame)


def test_replies_and_commands() -> None:
    assert encode_reply(7, b"done") == b"reply 7 done"
    assert encode_command("c1", b"open valve") == b"command c1 open valve"
