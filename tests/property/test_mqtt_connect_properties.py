"""CONNECT: any pieces give the same packet, what is encoded is decoded, and arbitrary bytes raise ConnectError alone."""

from hypothesis import given, settings, strategies as st

from gateway.wire.mqtt_connect import (
    CONNECT_BYTES_MAX,
    Connect,
    ConnectError,
    ConnectFault,
    ConnectScanner,
    encode_connect,
)

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def text(content: str) -> bytes:
    encoded = content.encode()
    return len(encoded).to_bytes(2, "big") + encoded


@st.composite
def connects(draw: st.DrawFn) -> Connect:
    level = draw(st.sampled_from([4, 5]))
    flags = draw(st.sampled_from([0, 2]))
    will = b""
    if draw(st.booleans()):
        flags |= 0x04 | draw(st.integers(0, 2)) << 3 | draw(st.sampled_from([0, 0x20]))
        payload = draw(st.binary(max_size=50))
        will = b"\x00" * (level == 5) + text(draw(texts)) + len(payload).to_bytes(2, "big") + payload
    user_name = draw(st.none() | texts)
    password = draw(st.none() | st.binary(max_size=40)) if level == 5 or user_name is not None else None
    properties = draw(st.binary(max_size=120).map(lambda raw: bytes([len(raw)]) + raw)) if level == 5 else b""
    return Connect(
        level, flags, draw(st.integers(0, 0xFFFF)), properties, draw(texts), will, user_name, password
    )


@patient
@given(connects(), st.lists(st.integers(1, 20), min_size=1, max_size=8), st.binary(max_size=20))
def test_any_pieces_give_what_was_encoded(connect: Connect, sizes: list[int], behind: bytes) -> None:
    packet = encode_connect(connect)
    scanner = ConnectScanner()
    at = 0
    for index in range(len(packet)):
        size = sizes[index % len(sizes)]
        piece = packet[at : at + size]
        at += size
        found = scanner.feed(piece + behind if at >= len(packet) else piece)
        if at >= len(packet):
            break
        assert found is None
    assert found == connect
    assert scanner.rest == behind


@patient
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(data: bytes, plausible: bool) -> None:
    if plausible:
        data = b"\x10" + bytes([len(data) % 128]) + b"\x00\x04MQTT" + data
    outcomes = []
    for pieces in ([data], [data[index : index + 1] for index in range(len(data))]):
        scanner = ConnectScanner()
        outcome: Connect | ConnectFault | None = None
        try:
            for piece in pieces:
                outcome = scanner.feed(piece)
                assert len(scanner._held) <= CONNECT_BYTES_MAX
                if outcome is not None:
                    break
        except ConnectError as exc:
            outcome = exc.fault
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]
