import itertools

from hypothesis import given, strategies as st

from gateway.registry.follower import merged

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)).map(lambda pair: (pair[0], sum(pair))))


def ids(some: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> set[int]:
    return {number for first, last in some for number in range(first, last + 1)}


@given(ranges)
def test_merged_ranges_have_the_same_ids_in_fewer_ranges(some: list[tuple[int, int]]) -> None:
    result = merged(some)
    assert ids(result) == ids(some)
    assert len(result) <= len(some)
    assert all(last + 1 < first for (_, last), (first, _) in itertools.pairwise(result))
