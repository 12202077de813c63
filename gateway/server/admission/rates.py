"""Rates and penalties by key, in bounded memory. Pure: time is an argument, in seconds of a clock that does not go back.

What is remembered stands in two generations: when the younger one is full, it becomes the older one, and the old one is
forgotten. So an entry outlives at least half of the bound in newer ones, nothing is ever searched for the oldest, and who
fills the memory with made-up keys makes the gateway forget, never refuse.
"""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["KEYS_MAX", "Penalties", "Rates"]

KEYS_MAX: Final = 65_536
"""Keys that one table remembers; each takes about 200 bytes."""
FREE_FAILURES: Final = 5
"""So many are forgiven: a key just rotated, a device that is being set up."""
PENALTY_FIRST_S: Final = 0.25
FORGOTTEN_AFTER_S: Final = 600.0
"""Without a failure for so long, a penalty begins from nothing."""
_ROUNDING: Final = 1e-6
"""Of a second: sums of floating point numbers are not exact."""

V = TypeVar("V")


class _Generations(Generic[V]):
    """A dictionary that forgets what was written longest ago once there are more than `keys_max` keys."""

    __slots__ = ("_half", "_older", "_younger")

    def __init__(self, keys_max: int) -> None:
        self._half = max(1, keys_max // 2)
        self._younger: dict[Hashable, V] = {}
        self._older: dict[Hashable, V] = {}

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def find(self, key: Hashable) -> V | None:
        value = self._younger.get(key)
        return self._older.get(key) if value is None else value

    def put(self, key: Hashable, value: V) -> None:
        if len(self._younger) >= self._half and key not in self._younger:
            self._older, self._younger = self._younger, {}
        self._younger[key] = value

    def discard(self, key: Hashable) -> None:
        self._younger.pop(key, None)
        self._older.pop(key, None)


class Rates:
    """A token bucket for each key: `per_s` a second on average, and up to `burst` at once, 1 at least.

    A bucket is one number, the time at which it is full again (the generic cell rate algorithm), so a key that is not
    remembered is a full bucket.
    """

    __slots__ = ("_full_at", "_span_s", "_step_s")

    def __init__(self, per_s: float, burst: float, keys_max: int = KEYS_MAX) -> None:
        self._step_s = 1 / per_s
        self._span_s = max(1.0, burst) * self._step_s + _ROUNDING
        self._full_at: _Generations[float] = _Generations(keys_max)

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: Hashable, now: float) -> bool:
        """Take a token; False: there is none."""
        full_at = self._full_at.find(key)
        full_at = (now if full_at is None or full_at < now else full_at) + self._step_s
        if full_at - now > self._span_s:
            return False
        self._full_at.put(key, full_at)
        return True


class Penalties:
    """How long the answer to a failure waits, by key: nothing at first, then each time twice as long, up to `max_s`."""

    __slots__ = ("_failures", "_free", "_max_s")

    def __init__(self, max_s: float, free: int = FREE_FAILURES, keys_max: int = KEYS_MAX) -> None:
        self._max_s = max_s
        self._free = free
        self._failures: _Generations[tuple[int, float]] = _Generations(keys_max)

    def __len__(self) -> int:
        return len(self._failures)

    def failed(self, key: Hashable, now: float) -> float:
        """Count a failure; the penalty in seconds."""
        count, last = self._failures.find(key) or (0, now)
        count = 1 if now - last > FORGOTTEN_AFTER_S else count + 1
        self._failures.put(key, (count, now))
        if count <= self._free:
            return 0.0
        doublings = min(count - self._free - 1, 32)
        return float(min(self._max_s, PENALTY_FIRST_S * 2**doublings))

    def succeeded(self, key: Hashable) -> None:
        """Whoever this is has proved the key: what failed before is forgiven."""
        if self._failures:
            self._failures.discard(key)
