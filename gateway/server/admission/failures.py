"""Handshakes that fail: how they are counted, logged and slowed down, so that a flood of them costs little.

What refuses a device here is never another one's failure. Every identity is looked up and its key is checked, whatever
failed before, from wherever; a right key goes in at once. What is limited is the failures themselves:

- above the rate of its address or network, a failure is counted as `rate_limited` and logged in sum, not line by line;
- one identity that fails again and again from one address gets its alert later each time. A decoy's identity waits as a
  known one's does, so the wait tells nothing.
"""

from typing import Final, NamedTuple

from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.admission.rates import FREE_FAILURES, Penalties, Rates
from gateway.server.networks import NetworkList, network_of
from gateway.telemetry.metrics import Outcome

__all__ = ["FailedHandshakes", "Failure"]

BURST_S: Final = 20.0
"""Failures that may come at once, in seconds of the rate: a site whose keys were all rotated shows them all."""
HELD_MAX: Final = 500
"""Alerts that one worker holds back at a time; beyond, they leave at once: holding must not use the connections up."""

_PROOFS: Final = frozenset({
    Outcome.UNKNOWN_IDENTITY, Outcome.WRONG_KEY, Outcome.DISABLED, Outcome.REVOKED, Outcome.EXPIRED,
    Outcome.NOT_YET_VALID, Outcome.ADDRESS_REFUSED,
})  # fmt: skip
"""Failures of who it is; the others are of what it speaks."""
_NOT_THE_PEERS: Final = frozenset({Outcome.NO_ROUTE, Outcome.RATE_LIMITED, Outcome.REGISTRY_STALE})

Pair = tuple[int, bytes, str]
"""Realm id, identity, address."""


class Failure(NamedTuple):
    """What becomes of one: whether it is one too many, counted as `rate_limited`, and how long its alert waits."""

    is_limited: bool
    hold_s: float


_NOTHING: Final = Failure(is_limited=False, hold_s=0.0)


class FailedHandshakes:
    """Args: the limits of the node, of which a worker enforces its share. `now` is a clock that does not go back."""

    def __init__(self, settings: LimitsSettings, workers: int) -> None:
        self._workers = workers
        self._held = 0
        self.has_any = False
        """Whether a proof ever failed, so that there may be something to forgive."""
        self.change(settings)

    def change(self, settings: LimitsSettings) -> None:
        """Put other bounds in force; what failed before is forgotten."""
        workers = self._workers
        self._exempt = NetworkList(settings.exempt_networks)
        self._addresses = _rates(settings.failures_per_address_per_s, workers)
        self._networks = _rates(settings.failures_per_network_per_s, workers)
        self._penalties = Penalties(settings.penalty_max_s, -(-FREE_FAILURES // workers))

    def failed(self, address: str, pair: Pair | None, outcome: Outcome, now: float) -> Failure:
        """A handshake failed; `pair` when an identity was looked up."""
        if address in self._exempt or outcome in _NOT_THE_PEERS:
            return _NOTHING
        is_within = self._addresses.take(address, now) and self._networks.take(network_of(address), now)
        hold_s = self._penalty(pair, now) if outcome in _PROOFS else 0.0
        return Failure(not is_within, hold_s)

    def proved(self, pair: Pair | None) -> None:
        """The device has proved its key: what failed in its name from its address is forgiven."""
        if pair is not None:
            self._penalties.succeeded(pair)

    def released(self) -> None:
        """An alert that was held back is said, or its peer is gone."""
        self._held -= 1

    def _penalty(self, pair: Pair | None, now: float) -> float:
        if pair is None:
            return 0.0
        self.has_any = True
        hold_s = self._penalties.failed(pair, now)
        if not hold_s or self._held >= HELD_MAX:
            return 0.0
        self._held += 1
        return hold_s


def _rates(per_s: float, workers: int) -> Rates:
    return Rates(per_s / workers, per_s * BURST_S / workers)
