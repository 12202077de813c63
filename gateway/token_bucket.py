"""A bound on how often something happens. Pure: time is an argument, in seconds of any clock."""

__all__ = ["TokenBucket"]


class TokenBucket:
    """Lets `rate` through in each second on average, and what it saved up, up to `burst`, at once."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def has(self, amount: float, now: float) -> bool:
        """Whether so much may come now."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return self._left >= amount

    def take(self, amount: float) -> None:
        """It came."""
        self._left -= amount

    def admits(self, now: float) -> bool:
        """Take one, when it may come now."""
        if not self.has(1, now):
            return False
        self.take(1)
        return True
