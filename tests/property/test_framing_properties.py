"""Lines in any pieces give the same frames, each over-long one once, in bounded memory."""

from hypothesis import example, given, settings, strategies as st

from gateway.wire.framing import Frame, LineDecoder, Oversized, encode_line

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

streams = st.lists(
    st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"bc", b"\x00\xff", b"0123456789", b"x" * 40]), max_size=40
).map(b"".join)
bounds = st.integers(0, 24)


def frames(pieces: list[bytes], bound: int) -> list[Frame]:
    decoder = LineDecoder(bound)
    found: list[Frame] = []
    for piece in pieces:
        found += decoder.feed(piece)
        assert len(decoder._rest or b"") <= bound + 1
    return found + decoder.finish() + decoder.finish()


def expected(data: bytes, bound: int) -> list[Frame]:
    """The rule, said once more and slowly."""
    *lines, rest = data.split(b"\n")
    payloads = [line.removesuffix(b"\r") for line in lines] + ([rest] if rest else [])
    return [payload if len(payload) <= bound else Oversized.FRAME for payload in payloads]


@patient
@given(streams, bounds, st.lists(st.integers(1, 30), min_size=1, max_size=8))
@example(b"x" * 40 + b"\n" + b"y", 3, [5])
@example(b"abc\r\n", 3, [4])
@example(b"abc\r", 3, [1])
def test_any_pieces_give_the_same_frames(data: bytes, bound: int, sizes: list[int]) -> None:
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    assert frames(pieces, bound) == expected(data, bound)


@patient
@given(streams, bounds)
def test_all_at_once(data: bytes, bound: int) -> None:
    assert frames([data], bound) == expected(data, bound)


@patient
@given(st.lists(st.binary(max_size=50).filter(lambda payload: not set(payload) & set(b"\r\n")), max_size=20))
def test_decode_gives_what_was_encoded(payloads: list[bytes]) -> None:
    assert frames([b"".join(map(encode_line, payloads))], 50) == payloads
