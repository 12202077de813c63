"""How long to wait before the next try: doubled each time, with jitter, so that a fleet does not come back as one."""

import random

__all__ = ["BackOff"]


class BackOff:
    """Waits between `first_s` and `longest_s`; each is drawn from the upper half of its bound, the first from all of it."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = 0.0

    def next(self) -> float:
        """Seconds to wait now."""
        if not self._next_s:
            self._next_s = self._first_s
            return random.uniform(0, self._first_s)  # noqa: S311 - spreads load, guards nothing
        self._next_s = min(self._next_s * 2, self._longest_s)
        return random.uniform(self._next_s / 2, self._next_s)  # noqa: S311 - as above

    def longest(self) -> float:
        """Seconds to wait where a try soon would be of no use."""
        self._next_s = self._longest_s
        return random.uniform(self._longest_s / 2, self._longest_s)  # noqa: S311 - as above

    def reset(self) -> None:
        """It worked: begin small again."""
        self._next_s = 0.0
