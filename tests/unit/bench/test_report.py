"""The report is made from result files alone."""

from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.cases import CASES
from bench.cases.memory import FRAMED, FRESH
from bench.errors import BenchError
from bench.figures import FIGURES
from bench.node import GATEWAY
from bench.peers import MOSQUITTO
from bench.plan import PSK_GCM
from bench.result import Result, Series, load, save
from bench.sections import SECTIONS
from bench.targets import TARGETS

PNG = b"\x89PNG\r\n\x1a\n"


def result(case: str, *series: Series, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "quick": False,
        "rounds": 3,
        "date": "2026-11-21 02:00",
        "revision": "abc123",
        "machine": {"Cores": "2"},
        "versions": {"Mosquitto": "2.0.11"},
        "others_busy": 0.01,
        "load_average": 0.1,
        "took_s": 12.0,
    }
    return Result(case=case, series=list(series), **fields | changes)


def handshakes(gateway_us: list[float], mosquitto_us: list[float], **changes: Any) -> Result:
    def series(server: str, values: list[float], generator_busy: float) -> Series:
        busy = {"server_busy": [0.97] * 3, "generator_busy": [generator_busy] * 3}
        latencies = {"p50_us": [10.0] * 3, "p99_us": [20.0] * 3, "p999_us": [1030.0] * 3}
        return Series(PSK_GCM.label, 64, server, {"cpu_us": values, **latencies, **busy})

    return result(
        "handshake", series(GATEWAY, gateway_us, 0.4), series(MOSQUITTO, mosquitto_us, 0.5), **changes
    )


def line_with(page: str, *cells: str) -> str:
    found = [line for line in page.splitlines() if all(f"| {cell} |" in line for cell in cells)]
    assert len(found) == 1, found
    return found[0]


TARGET = f"connect + handshake + close, {PSK_GCM.label}, 64 clients"


def test_a_ratio_is_the_median_of_the_ratios_within_the_rounds() -> None:
    # The ratio of the medians would be 2.0.
    page = report.render([handshakes([100, 200, 400], [100, 400, 100])])
    line = line_with(page, TARGET, "Mosquitto")
    assert "| 200 (100-400) us | 100 (100-400) us | 1.00x (0.50-4.00) | met |" in line


def test_a_target_that_is_missed_keeps_its_row() -> None:
    page = report.render([handshakes([130, 140, 150], [100, 100, 100])])
    assert line_with(page, TARGET, "Mosquitto").endswith("| 1.40x (1.30-1.50) | **missed** |")


def test_what_was_not_quiet_or_small_is_said_beside_the_verdict() -> None:
    page = report.render([handshakes([90, 90, 90], [100, 100, 100], quick=True, others_busy=0.3)])
    assert line_with(page, TARGET, "Mosquitto").endswith("| met (quick, not quiet) |")
    assert "other programs took 30% of the machine, load average before 0.1: not quiet, run it again" in page


def test_what_nobody_looked_at_does_not_count_as_quiet() -> None:
    page = report.render([handshakes([90, 90, 90], [100, 100, 100], others_busy=None, note="By hand.")])
    assert line_with(page, TARGET, "Mosquitto").endswith("| met (not quiet) |")
    assert "**load average before 0.1: not quiet, run it again**" in page
    assert "By hand.\n" in page


def test_a_target_without_a_peer_is_held_to_the_figure_itself() -> None:
    fresh = Series(FRESH, 1000, FRAMED, {"session_kib": [23.0, 24.5, 25.0]})
    line = line_with(report.render([result("memory", fresh)]), "idle session, fresh")
    assert line.endswith("| <= 24.0 KiB | 24.5 (23.0-25.0) KiB | - | - | **missed** |")


def test_every_target_has_a_row_when_nothing_was_measured() -> None:
    page = report.render([])
    assert page.count("| not measured |") == len(TARGETS)


def test_a_row_says_what_limited_it() -> None:
    page = report.render([handshakes([90, 90, 90], [100, 100, 100])])
    assert line_with(page, "64", "Gateway", "97%").endswith("| 10 / 20 / 1,030 | 97% | 40% | server |")


@pytest.mark.parametrize(
    ("at", "server", "generator", "limit"),
    [
        (64, 0.5, 0.95, "generator"),
        (64, 0.5, 0.5, "neither alone"),
        (1, 0.5, 0.5, "turn-taking"),
        (1, 14.0, 1.0, "server"),
    ],
)
def test_the_limit_of_a_row(at: int, server: float, generator: float, limit: str) -> None:
    series = Series("x", at, GATEWAY, {"server_busy": [server], "generator_busy": [generator]})
    page = report.render([result("growth-workers", series)])
    assert line_with(page, f"{at}", "Gateway").endswith(f"| {limit} |")


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    written = handshakes([1, 2, 3], [4, 5, 6])
    save(tmp_path, written)
    assert load(tmp_path, ["memory", "handshake"]) == [written]


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('{"case": "memory"}')
    with pytest.raises(BenchError, match=r"memory\.json is not a result of this bench suite"):
        load(tmp_path, ["memory"])


@pytest.mark.parametrize("case", ["handshake", "growth-registry"])
def test_page_and_chart_are_written(tmp_path: Path, case: str) -> None:
    series = [Series("work", at, GATEWAY, {"cpu_us": [1.0, 2.0]}) for at in (1000, 10_000)]
    page = report.write(tmp_path, [result(case, *series)])
    assert f"(charts/{case}.png)" in page.read_text()
    assert (tmp_path / "charts" / f"{case}.png").read_bytes().startswith(PNG)


def test_every_case_has_a_section_and_every_target_a_case() -> None:
    assert set(CASES) <= set(SECTIONS)
    assert {target.case for target in TARGETS} <= set(CASES)
    assert {target.figure for target in TARGETS} <= set(FIGURES)
    assert {figure for section in SECTIONS.values() for figure in section.charted} <= set(FIGURES)


def test_the_committed_results_are_read_and_rendered() -> None:
    bench = Path(__file__).parents[3] / "bench"
    results = load(bench / "results", report.ORDER)
    assert results
    assert report.render(results) == (bench / "RESULTS.md").read_text(encoding="utf-8")
