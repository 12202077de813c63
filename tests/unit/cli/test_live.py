import pytest

from gateway.cli.live import age, size


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0s"), (0.9, "0s"), (59, "59s"), (60, "1m00s"), (3_725, "1h02m"), (86_399, "23h59m"), (273_600, "3d04h")],
)  # fmt: skip
def test_ages(seconds: float, shown: str) -> None:
    assert age(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0B"), (999, "999B"), (1_000, "1.0k"), (12_345, "12k"), (1_000_000, "1.0M"), (34_567_890, "35M"),
     (5 * 10**15, "5000T")],
)  # fmt: skip
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown
