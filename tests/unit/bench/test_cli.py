"""`python -m bench`, without measuring anything real."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import __main__ as cli
from bench.cases import CASES, Case
from bench.errors import BenchError
from bench.node import GATEWAY
from bench.suite import Suite


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command with two cases that cost nothing; its files go to `tmp_path`."""

    def small(suite: Suite) -> None:
        for number in range(suite.rounds):
            suite.record.add("work", 1, GATEWAY, {"cpu_us": float(number), "memory_mib": float(suite.quick)})

    def broken(_: Suite) -> None:
        raise BenchError("the peer is away: start it")

    monkeypatch.setattr(
        cli, "CASES", {"handshake": Case(small), "memory": Case(small), "stream": Case(broken)}
    )
    monkeypatch.setattr(cli, "ensure_installed", lambda say: None)  # noqa: ARG005 -- nothing is needed
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments: str) -> int:
        return cli.main([*arguments, "--results", str(tmp_path / "results"), "--output", str(tmp_path)])

    return run


def test_a_case_alone_leaves_the_results_of_the_others(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("handshake", "memory") == 0
    before = (tmp_path / "results" / "handshake.json").read_bytes()
    assert bench("memory", "--rounds", "7") == 0
    assert (tmp_path / "results" / "handshake.json").read_bytes() == before
    page = (tmp_path / "RESULTS.md").read_text()
    assert "5 rounds" in page
    assert "7 rounds" in page


def test_quick_is_passed_on_and_said(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("memory", "--quick") == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert "quick size, 2 rounds" in page


def test_render_measures_nothing(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("--render") == 0
    assert not (tmp_path / "results").exists()
    assert "not measured" in (tmp_path / "RESULTS.md").read_text()


def test_a_case_that_fails_is_one_line_and_writes_nothing(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("stream") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: the peer is away: start it"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such"], "no such case: no-such; there are handshake, memory, stream"),
        (["memory", "--rounds", "0"], "--rounds: at least 1"),
        (["memory", "--render"], "--render measures nothing: name no case"),
    ],
)
def test_wrong_usage_is_refused(
    bench: Callable[..., int], arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert complaint in capsys.readouterr().err


def test_help_names_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no name is broken at its hyphen
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in CASES)
