"""Token buckets and penalties: never more than the rate and the burst, never less, and bounded memory."""

import itertools

from hypothesis import given, settings, strategies as st

from gateway.server.admission.rates import FORGOTTEN_AFTER_S, FREE_FAILURES, Penalties, Rates

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

steps = st.lists(st.floats(0, 5), min_size=1, max_size=120)
rates = st.floats(0.05, 50)
bursts = st.integers(1, 30)


@patient
@given(rates, bursts, steps)
def test_in_no_stretch_of_time_comes_more_than_the_burst_and_the_rate(
    per_s: float, burst: int, gaps: list[float]
) -> None:
    bucket = Rates(per_s, burst)
    taken = [now for now in itertools.accumulate(gaps) if bucket.take("key", now)]
    for first, start in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + per_s * (taken[last] - start) + 0.001


@patient
@given(rates, bursts, steps)
def test_it_is_a_token_bucket(per_s: float, burst: int, gaps: list[float]) -> None:
    bucket = Rates(per_s, burst)
    tokens, last = float(burst), 0.0
    for now in itertools.accumulate(gaps):
        tokens = min(float(burst), tokens + (now - last) * per_s)
        last = now
        taken = bucket.take("key", now)
        if abs(tokens - 1) > 0.001:  # else rounding decides
            assert taken == (tokens >= 1)
        tokens -= taken


@patient
@given(st.lists(st.integers(0, 400), max_size=400), st.integers(2, 60))
def test_memory_is_bounded_and_the_last_half_is_remembered(keys: list[int], keys_max: int) -> None:
    bucket, penalties = Rates(0.001, 1, keys_max), Penalties(1, 0, keys_max)
    for key in keys:
        bucket.take(key, 0)
        penalties.failed(key, 0)
        assert len(bucket) <= 2 * (keys_max // 2) + 1
        assert len(penalties) <= 2 * (keys_max // 2) + 1
    for key in list(dict.fromkeys(reversed(keys)))[: keys_max // 2]:
        assert penalties._failures.find(key) is not None


REMEMBERED_S = FORGOTTEN_AFTER_S - 1e-6
"""Times are sums of these gaps: at the bound itself their rounding may go beyond it."""


@patient
@given(st.lists(st.floats(0, REMEMBERED_S), min_size=1, max_size=50), st.floats(0, 10))
def test_a_penalty_never_shrinks_while_it_fails(gaps: list[float], max_s: float) -> None:
    penalties = Penalties(max_s)
    waits = [penalties.failed("key", now) for now in itertools.accumulate(gaps)]
    assert waits[:FREE_FAILURES] == [0.0] * min(FREE_FAILURES, len(waits))
    assert waits == sorted(waits)
    assert max(waits) <= max_s
    last = sum(gaps) + 2 * FORGOTTEN_AFTER_S
    assert penalties.failed("key", last) == 0
