"""A framed session, whatever the pieces and whenever the backend settles: each frame one answer, in order, in bounds."""

from hypothesis import given, settings, strategies as st

from gateway.wire.framing import Frame
from gateway.wire.framings import FRAMINGS
from tests.unit.forward.test_framed import Play

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

contents = st.lists(st.sampled_from([b"", b"ok", b"\xff", b"x" * 1001, b"twenty one"]), max_size=60)
steps = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 40), st.booleans()), max_size=30)


@patient
@given(st.sampled_from(sorted(FRAMINGS)), contents, steps)
def test_one_answer_each_in_order(
    framing: str, frames: list[bytes], script: list[tuple[int, int, bool]]
) -> None:
    encode = FRAMINGS[framing].encode
    data = b"".join(map(encode, frames))
    play = Play(framing)
    for size, settled, is_slow in script:
        piece, data = data[:size], data[size:]
        if is_slow:
            play.session.pause_sending()
        if piece:
            play.session.device_sent(piece)
        play.delivery.settle(count=min(settled, len(play.delivery.unsettled)))
        play.run_soon()
        if is_slow:
            play.session.resume_sending()
    if data:
        play.session.device_sent(data)
    play.session.device_finished(orderly=True)
    while play.delivery.unsettled:
        play.delivery.settle(count=len(play.delivery.unsettled))
        play.run_soon()
    play.run_soon()
    assert answers(framing, play.device.sent) == [
        f"error {number} {problem(frame)}".encode() if problem(frame) else f"ok {number}".encode()
        for number, frame in enumerate(frames, start=1)
    ]
    assert play.is_closed()
    assert play.log.frames == len(frames)


def problem(frame: bytes) -> str:
    return "too_long" if len(frame) > 1000 else "invalid" if b"\xff" in frame else ""


def answers(framing: str, sent: bytes) -> list[Frame]:
    decoder = FRAMINGS[framing].decoder(1000)
    return decoder.feed(sent) + decoder.finish()
