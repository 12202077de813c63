"""What becomes of a failed handshake: outcome and penalty."""

from typing import Any

import pytest

from gateway.server.admission.failures import BURST_S, HELD_MAX, FailedHandshakes
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.admission.rates import FREE_FAILURES
from gateway.telemetry.metrics import Outcome

ADDRESS, OTHER = "192.0.2.1", "198.51.100.1"
PAIR = (1, b"meter", ADDRESS)


def watch(workers: int = 1, **settings: Any) -> FailedHandshakes:
    return FailedHandshakes(LimitsSettings.model_validate(settings), workers)


@pytest.mark.parametrize(("per", "beside"), [("address", "192.0.2.2"), ("network", "192.0.3.1")])
def test_failures_above_the_rate_are_rate_limited(per: str, beside: str) -> None:
    failures = watch(**{f"failures_per_{per}_per_s": 1})
    for _ in range(round(BURST_S)):
        failure = failures.failed(ADDRESS, None, Outcome.PROTOCOL_ERROR, 0)
        assert failure == (False, 0.0)
    assert failures.failed(ADDRESS, None, Outcome.PROTOCOL_ERROR, 0) == (True, 0.0)
    assert failures.failed(beside, None, Outcome.TIMEOUT, 0) == (False, 0.0)
    assert failures.failed(ADDRESS, None, Outcome.TIMEOUT, 1) == (False, 0.0)


def test_one_identity_from_one_address_waits_longer_each_time() -> None:
    failures = watch(penalty_max_s=1)
    waits = [failures.failed(ADDRESS, PAIR, Outcome.WRONG_KEY, 0).hold_s for _ in range(FREE_FAILURES + 5)]
    assert waits == [0.0] * FREE_FAILURES + [0.25, 0.5, 1.0, 1.0, 1.0]
    assert failures.failed(ADDRESS, (1, b"other", ADDRESS), Outcome.WRONG_KEY, 0).hold_s == 0
    assert failures.failed(OTHER, (1, b"meter", OTHER), Outcome.WRONG_KEY, 0).hold_s == 0
    assert failures.failed(ADDRESS, (2, b"meter", ADDRESS), Outcome.WRONG_KEY, 0).hold_s == 0


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN_IDENTITY, Outcome.DISABLED, Outcome.EXPIRED])
def test_whatever_the_reason_the_wait_is_the_same(outcome: Outcome) -> None:
    failures = watch()
    waits = [failures.failed(ADDRESS, PAIR, outcome, 0).hold_s for _ in range(FREE_FAILURES + 1)]
    assert waits == [0.0] * FREE_FAILURES + [0.25]


def test_a_right_key_ends_the_penalty() -> None:
    failures = watch()
    for _ in range(FREE_FAILURES + 3):
        failures.failed(ADDRESS, PAIR, Outcome.WRONG_KEY, 0)
    failures.proved(PAIR)
    assert failures.failed(ADDRESS, PAIR, Outcome.WRONG_KEY, 0).hold_s == 0


def test_what_is_no_failed_proof_has_no_penalty() -> None:
    failures = watch()
    for outcome in (Outcome.PEER_CLOSED, Outcome.TIMEOUT, Outcome.NO_ROUTE, Outcome.NO_SHARED_CIPHER):
        for _ in range(FREE_FAILURES + 1):
            assert failures.failed(ADDRESS, PAIR, outcome, 0).hold_s == 0


def test_so_many_alerts_are_held_and_no_more() -> None:
    failures = watch()
    held = 0
    for _ in range(FREE_FAILURES + HELD_MAX + 10):
        held += failures.failed(ADDRESS, PAIR, Outcome.WRONG_KEY, 0).hold_s > 0
    assert held == HELD_MAX
    failures.released()
    assert failures.failed(ADDRESS, PAIR, Outcome.WRONG_KEY, 0).hold_s > 0


def test_exempt_networks() -> None:
    failures = watch(failures_per_address_per_s=1, exempt_networks=["192.0.2.0/24"])
    for _ in range(100):
        assert failures.failed(ADDRESS, PAIR, Outcome.WRONG_KEY, 0) == (False, 0.0)
