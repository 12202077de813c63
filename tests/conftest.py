"""What every test may use."""

import signal
from collections.abc import Callable

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell's background job ignores it, and so would all programs that the tests start and interrupt."""

_LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Report a measured number: shown with the test's name at the end of the run."""

    def report(what: str) -> None:
        request.config.stash.setdefault(_LINES, []).append(f"{request.node.name}: {what}")

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured."""
    lines = config.stash.get(_LINES, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
