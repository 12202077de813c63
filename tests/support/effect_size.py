"""How far two samples are apart, in terms that noise does not blow up."""

from collections.abc import Sequence

__all__ = ["cliffs_delta"]


def cliffs_delta(first: Sequence[float], second: Sequence[float]) -> float:
    """How much more often a value of `first` is above one of `second` than below: from -1 to 1; 0 when neither is larger.

    By the sum of ranks, values that are equal sharing theirs.
    """
    pooled = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    rank_sum = 0.0
    at = 0
    while at < len(pooled):
        end = at
        while end < len(pooled) and pooled[end][0] == pooled[at][0]:
            end += 1
        shared = (at + 1 + end) / 2
        rank_sum += shared * sum(1 for _, which in pooled[at:end] if which == 0)
        at = end
    above = rank_sum - len(first) * (len(first) + 1) / 2
    return 2 * above / (len(first) * len(second)) - 1
