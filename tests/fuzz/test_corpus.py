"""What the fuzzers found, and a few thousand bytes beside it, break no parser."""

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.fuzz.targets import TARGETS, corpus_of

CHANGES_MAX = 6


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_breaks_nothing(name: str) -> None:
    inputs = corpus_of(name)
    assert len(inputs) >= 5, "a corpus that is missing replays nothing"
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as exc:  # the input is what one wants to know
            exc.add_note(f"input: {path}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_beside_the_corpus_break_nothing(name: str) -> None:
    """The corpus with some bytes changed, cut out, repeated or joined to another input: new ones in every run."""
    inputs = st.sampled_from([path.read_bytes() for path in corpus_of(name)])

    @settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), start=inputs)
    def run(data: st.DataObject, start: bytes) -> None:
        changed = bytearray(start)
        for _ in range(data.draw(st.integers(0, CHANGES_MAX))):
            at = data.draw(st.integers(0, len(changed)))
            end = min(len(changed), at + data.draw(st.integers(0, 8)))
            changed[at:end] = data.draw(st.binary(max_size=8))
        changed += data.draw(st.just(b"") | inputs)
        TARGETS[name](bytes(changed))

    run()
