"""Length-prefixed frames in any pieces are the same frames, each over-long one once, in bounded memory."""

from hypothesis import given, settings, strategies as st

from gateway.wire.framing import Frame, Oversized, Truncated
from gateway.wire.length_framing import LengthDecoder, encode_length

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

prefixes = st.sampled_from([2, 4])
bounds = st.integers(0, 40)
cuts = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def pieces_of(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    return pieces


def frames(pieces: list[bytes], prefix: int, bound: int) -> list[Frame]:
    decoder = LengthDecoder(prefix, bound)
    found: list[Frame] = []
    for piece in pieces:
        found += decoder.feed(piece)
        assert len(decoder._held) <= max(bound, prefix - 1)
    return found + decoder.finish() + decoder.finish()


def expected(data: bytes, prefix: int, bound: int) -> list[Frame]:
    """The rule, said once more and slowly."""
    found: list[Frame] = []
    while data:
        if len(data) < prefix:
            return [*found, Truncated.FRAME]
        length = int.from_bytes(data[:prefix], "big")
        data = data[prefix:]
        if length > bound:
            found.append(Oversized.FRAME)
        elif length > len(data):
            return [*found, Truncated.FRAME]
        else:
            found.append(data[:length])
        data = data[length:]
    return found


@patient
@given(prefixes, bounds, st.lists(st.binary(max_size=60), max_size=12), st.binary(max_size=6), cuts)
def test_any_pieces_give_the_same_frames(
    prefix: int, bound: int, contents: list[bytes], rest: bytes, sizes: list[int]
) -> None:
    data = b"".join(encode_length(prefix, content) for content in contents) + rest
    assert frames(pieces_of(data, sizes), prefix, bound) == expected(data, prefix, bound)
    assert frames([data], prefix, bound) == expected(data, prefix, bound)


@patient
@given(prefixes, bounds, st.binary(max_size=200), cuts)
def test_any_bytes(prefix: int, bound: int, data: bytes, sizes: list[int]) -> None:
    assert frames(pieces_of(data, sizes), prefix, bound) == expected(data, prefix, bound)


@patient
@given(prefixes, st.lists(st.binary(max_size=50), max_size=20))
def test_decode_gives_what_was_encoded(prefix: int, contents: list[bytes]) -> None:
    assert frames([b"".join(encode_length(prefix, content) for content in contents)], prefix, 50) == contents
