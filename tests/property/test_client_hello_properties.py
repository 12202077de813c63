"""The ClientHello scanner: the verdict depends on the bytes alone, and is a hello or a PeerError."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from gateway.errors import PeerError
from gateway.wire.client_hello import (
    ClientHello,
    HelloScanner,
    OfferedPsk,
    decode_client_hello,
)
from gateway.wire.hello_memory import HELLOS_KEPT_MAX, HelloMemory

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

BOUND = 2048
VECTORS = [
    bytes.fromhex(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "unit" / "wire" / "vectors").glob("*.hex"))
]


def sized(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size) + data


def words(values: tuple[int, ...]) -> bytes:
    return b"".join(value.to_bytes(2) for value in values)


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2) + sized(data)


@dataclass(frozen=True)
class Sample:
    """A hello, and the body that says it."""

    hello: ClientHello
    body: bytes


words16 = st.integers(0, 0xFFFF)
host_names = st.from_regex(r"[a-z0-9_.-]{1,40}", fullmatch=True)
psks = st.builds(OfferedPsk, st.binary(min_size=1, max_size=140), st.integers(32, 255))
other_extensions = st.dictionaries(
    words16.filter(lambda kind: kind not in {0, 10, 13, 16, 41, 43, 45, 51}),
    st.binary(max_size=40),
    max_size=6,
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    versions = tuple(draw(st.lists(words16, max_size=8)))
    groups = tuple(draw(st.lists(words16, max_size=12)))
    signatures = tuple(draw(st.lists(words16, max_size=12)))
    modes = tuple(draw(st.lists(st.integers(0, 0xFF), max_size=3)))
    alpn = tuple(draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)))
    name = draw(st.none() | host_names)
    offered = tuple(draw(st.lists(psks, max_size=3)))
    legacy_version = draw(words16)
    suites = tuple(draw(st.lists(words16, min_size=1, max_size=60)))

    extensions = [extension(kind, data) for kind, data in draw(other_extensions).items()]
    if draw(st.booleans()):
        extensions.append(extension(51, draw(st.binary(max_size=80))))
    if versions:
        extensions.append(extension(43, sized(words(versions), 1)))
    if groups:
        extensions.append(extension(10, sized(words(groups))))
    if signatures:
        extensions.append(extension(13, sized(words(signatures))))
    if modes:
        extensions.append(extension(45, sized(bytes(modes), 1)))
    if alpn:
        extensions.append(extension(16, sized(b"".join(sized(each, 1) for each in alpn))))
    if name is not None:
        extensions.append(
            extension(0, sized(b"\x00" + sized(draw(st.sampled_from([name, name.upper()])).encode())))
        )
    extensions = draw(st.permutations(extensions))
    if offered:
        identities = b"".join(
            sized(psk.identity) + draw(st.binary(min_size=4, max_size=4)) for psk in offered
        )
        binders = b"".join(sized(bytes(psk.binder_length), 1) for psk in offered)
        extensions = [*extensions, extension(41, sized(identities) + sized(binders))]

    body = b"".join(
        (
            legacy_version.to_bytes(2),
            draw(st.binary(min_size=32, max_size=32)),
            sized(draw(st.binary(max_size=32)), 1),
            sized(words(suites)),
            sized(draw(st.binary(min_size=1, max_size=4)), 1),
            sized(b"".join(extensions)) if extensions else b"",
        )
    )
    hello = ClientHello(
        legacy_version=legacy_version,
        versions=versions or (min(legacy_version, 0x0303),),
        suites=suites,
        server_name=name,
        alpn=alpn,
        psks=offered,
        groups=groups,
        psk_modes=modes,
        signatures=signatures,
    )
    return Sample(hello, body)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` in pieces of these sizes, over and over."""
    pieces = []
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
        turn += 1
    return pieces


def records(body: bytes, sizes: list[int]) -> bytes:
    message = b"\x01" + sized(body, 3)
    return b"".join(b"\x16\x03\x01" + sized(fragment) for fragment in cut(message, sizes))


Verdict = ClientHello | None | tuple[object, ...]


def verdict(pieces: list[bytes], *, bound: int = BOUND) -> tuple[Verdict, HelloScanner]:
    scanner = HelloScanner(bound)
    for piece in pieces:
        try:
            hello = scanner.feed(piece)
        except PeerError as exc:
            return exc.args, scanner
        if hello is not None:
            return hello, scanner
        assert len(scanner.received) <= bound + 5
    return None, scanner


sizes_of_pieces = st.lists(st.integers(1, 600), min_size=1, max_size=8)

# Bytes that get past the first checks: noise, noise behind a plausible start, and real flights with a few bytes changed.
arbitrary = st.one_of(
    st.binary(max_size=300),
    st.builds(records, st.binary(max_size=400), sizes_of_pieces),
    st.builds(
        lambda start, rest: start + rest,
        st.sampled_from([b"\x16\x03\x01", b"GE", b"\x80\x2e", b"\x15\x03"]),
        st.binary(max_size=60),
    ),
    st.builds(
        lambda data, changes: bytes(changes.get(at, each) for at, each in enumerate(data)),
        st.sampled_from(VECTORS),
        st.dictionaries(st.integers(0, 520), st.integers(0, 255), max_size=4),
    ),
)


@patient
@given(samples())
def test_decode_gives_what_was_encoded(sample: Sample) -> None:
    assert decode_client_hello(sample.body) == sample.hello


@patient
@given(samples(), sizes_of_pieces, sizes_of_pieces, st.binary(max_size=50))
def test_any_records_in_any_pieces(
    sample: Sample, fragments: list[int], pieces: list[int], after: bytes
) -> None:
    data = records(sample.body, fragments) + after
    found, scanner = verdict(cut(data, pieces), bound=1 << 16)
    assert found == sample.hello
    assert data.startswith(scanner.received)


@patient
@given(arbitrary, sizes_of_pieces)
@example(b"\x16\x03\x01\x00\x04\x01\x00\xff\xff", [9])
def test_arbitrary_bytes_have_one_verdict(data: bytes, pieces: list[int]) -> None:
    at_once, _ = verdict([data])
    bytewise, _ = verdict(cut(data, [1]))
    in_pieces, _ = verdict(cut(data, pieces))
    assert at_once == bytewise == in_pieces


@patient
@given(st.binary(max_size=300))
def test_arbitrary_bodies_decode_or_are_refused(body: bytes) -> None:
    try:
        hello = decode_client_hello(body)
    except PeerError:
        return
    assert len(hello.suites) > 0


@patient
@given(samples(), sizes_of_pieces, st.integers(-3, 3))
def test_bound_is_exact(sample: Sample, fragments: list[int], room: int) -> None:
    data = records(sample.body, fragments)
    found, _ = verdict([data], bound=len(data) + room)
    assert (found == sample.hello) == (room >= 0)
    again, _ = verdict(cut(data, [7]), bound=len(data) + room)
    assert again == found


def remembered(memory: HelloMemory, data: bytes) -> Verdict:
    try:
        return memory.read(data)
    except PeerError as exc:
        return exc.args


@patient
@given(st.lists(st.one_of(arbitrary, samples().map(lambda each: records(each.body, [1 << 14]))), max_size=6))
def test_a_memory_says_nothing_else_than_a_scanner(flights: list[bytes]) -> None:
    memory = HelloMemory()
    for data in flights + flights:
        found = remembered(memory, data)
        assert found is None or found == verdict([data], bound=1 << 14)[0]


@patient
@given(samples(), st.binary(min_size=32, max_size=32), st.binary(max_size=32))
def test_hellos_that_differ_in_random_and_session_id_say_the_same(
    sample: Sample, random: bytes, session_id: bytes
) -> None:
    memory = HelloMemory()
    body = sample.body
    other = body[:2] + random + sized(session_id, 1) + body[35 + body[34] :]
    assert memory.read(records(body, [1 << 14])) == sample.hello
    assert memory.read(records(other, [1 << 14])) == sample.hello


CURVE = b"\x00\x1d\x00\x20"


def tls13_flight(name: bytes, share: bytes, identity: bytes, binder: bytes) -> bytes:
    """A hello as OpenSSL makes them: what differs from one to the next is `share`, `identity` and `binder`."""
    extensions = (
        extension(0, sized(b"\x00" + sized(name)))
        + extension(43, b"\x02\x03\x04")
        + extension(45, b"\x01\x01")
        + extension(21, bytes(7))
        + extension(51, sized(CURVE + share))
        + extension(41, sized(sized(identity) + bytes(4)) + sized(sized(binder, 1)))
    )
    body = b"\x03\x03" + bytes(32) + b"\0" + sized(words((0x1301, 0x1303))) + sized(b"\0", 1)
    return records(body + sized(extensions), [1 << 14])


shares = st.binary(min_size=32, max_size=32)
identities = st.binary(min_size=8, max_size=8)
binders = st.binary(min_size=32, max_size=32)


@patient
@given(shares, identities, binders)
def test_hellos_of_tls13_that_differ_in_their_keys_are_remembered(
    share: bytes, identity: bytes, binder: bytes
) -> None:
    memory = HelloMemory()
    memory.read(tls13_flight(b"hall", bytes(32), bytes(8), bytes(32)))
    hello = memory.read(tls13_flight(b"hall", share, identity, binder))
    assert hello is not None
    assert (hello.server_name, hello.versions, hello.psks) == (
        "hall",
        (0x0304,),
        (OfferedPsk(identity, 32),),
    )
    assert len(memory._hellos) == 1


@pytest.mark.parametrize("change", [0x01, 0x02, 0x80, 0xFF])
def test_a_memory_of_tls13_says_nothing_else_than_a_scanner(change: int) -> None:
    """Whichever byte of the next hello is another one."""
    memory = HelloMemory()
    flight = tls13_flight(b"hall", bytes(32), b"dev-0001", bytes(32))
    for at, each in enumerate(flight):
        assert memory.read(flight) is not None
        changed = flight[:at] + bytes([each ^ change]) + flight[at + 1 :]
        found = remembered(memory, changed)
        assert found is None or found == verdict([changed], bound=1 << 14)[0], at


def test_a_memory_is_bounded_and_goes_on() -> None:
    memory = HelloMemory()
    hello = b"\x03\x03" + bytes(32) + b"\0" + sized(words((0xA8,))) + sized(b"\0", 1)
    for number in range(3 * HELLOS_KEPT_MAX):
        data = records(hello + sized(extension(99, number.to_bytes(4))), [1 << 14])
        assert memory.read(data) == decode_client_hello(data[9:])
        assert len(memory._hellos) <= HELLOS_KEPT_MAX
