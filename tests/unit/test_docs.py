"""The documentation names every command, key, combination and metric, with the defaults that are in force."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.main import get_command

from gateway.cli import root_app
from gateway.config import load
from gateway.forward.settings import RouteMatch, RouteSettings
from gateway.registry.settings import RegistrySettings
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.settings import Address, ListenerSettings, NodeSettings
from gateway.server.supervision.admin_settings import AdminSettings
from gateway.telemetry.logs import LogSettings
from gateway.telemetry.metrics import FollowerMetrics, Outcome, SupervisorMetrics, WorkerMetrics
from gateway.wire.framing import Reason

DOCS = Path(__file__).parents[2] / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text()
COMMANDS = (DOCS / "commands.md").read_text()
METRICS = (DOCS / "metrics.md").read_text()

SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("[node]", NodeSettings, ""),
    ("[registry]", RegistrySettings, ""),
    ("[limits]", LimitsSettings, ""),
    ("[admin]", AdminSettings, ""),
    ("[log]", LogSettings, ""),
    ("[[listeners]]", ListenerSettings, ""),
    ("[[routes]]", RouteSettings, ""),
    ("[[routes]]", RouteMatch, "match."),
]


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next of its level."""
    level = "#" * (len(heading) - len(heading.lstrip("#")))
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"no heading {heading}"
    return re.split(rf"^{level} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the rows of tables."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def written(default: Any) -> str | None:
    """A default as the table has it; None where it says in words what it is."""
    if default is PydanticUndefined or default is None:
        return None
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, int | float):
        return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
    if isinstance(default, str | Path | Address):
        return f'`"{default}"`'
    return None


@pytest.mark.parametrize(
    ("heading", "model", "prefix"), SECTIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_key_is_documented_with_its_default(heading: str, model: type[BaseModel], prefix: str) -> None:
    table = {row[0]: row for row in rows(section(CONFIGURATION, f"## {heading}"))}
    for name, field in model.model_fields.items():
        row = table[f"`{prefix}{name}`"]
        default = written(field.default)
        assert default is None or row[1] == default, f"{heading} {name}: {row[1]} is {default}"


def test_the_bounds_of_limits_are_those_in_force() -> None:
    table = {row[0]: row for row in rows(section(CONFIGURATION, "## [limits]"))}
    for name, field in LimitsSettings.model_fields.items():
        if field.annotation not in {int, float}:
            continue
        (upper,) = [bound.le for bound in field.metadata if hasattr(bound, "le")]
        assert table[f"`{name}`"][2].replace(",", "").endswith(f" {upper:.0f}"), name


def test_the_documented_configuration_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", CONFIGURATION, re.DOTALL)
    (tmp_path / "gateway.toml").write_text(example)
    assert len(load(tmp_path / "gateway.toml", {}).routes) == 2


def test_every_command_is_documented_with_its_options() -> None:
    commands: dict[str, Any] = cast("Any", get_command(root_app())).commands
    assert len(commands) >= 15
    for name, command in commands.items():
        text = section(COMMANDS, f"### {name}")
        assert f"`gatewayctl {name}" in text, name
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                assert parameter.metavar in text, f"{name} {parameter.metavar}"
            else:
                assert f"`{parameter.opts[0]}" in text or f" {parameter.opts[0]} " in text, (
                    f"{name} {parameter.opts}"
                )


def test_commands_stand_under_the_headings_of_the_help() -> None:
    commands: dict[str, Any] = cast("Any", get_command(root_app())).commands
    documented: dict[str, str] = {}
    panel = ""
    for marks, title in re.findall(r"^(##|###) (.+)$", COMMANDS, re.MULTILINE):
        if marks == "##":
            panel = title
        else:
            documented[title] = panel
    assert documented == {name: command.rich_help_panel for name, command in commands.items()}


def test_every_metric_is_documented_with_its_labels() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry)
    declared = list(
        registry._collector_to_names
    )  # the only place where metrics without samples show their labels
    other = CollectorRegistry()
    FollowerMetrics(other)
    declared += other._collector_to_names
    other = CollectorRegistry()
    SupervisorMetrics(other, version="", python="", openssl="")
    declared += other._collector_to_names

    documented = {row[0]: row for row in rows(METRICS) if row[0].startswith("`pskgw_")}
    expected = dict(_described(collector) for collector in declared if hasattr(collector, "_labelnames"))
    assert {name: (row[1], row[2]) for name, row in documented.items()} == expected


def _described(collector: Collector) -> tuple[str, tuple[str, str]]:
    metric: Any = collector
    kind = metric._type
    name = metric._name + ("_total" if kind == "counter" else "")
    return f"`{name}`", (kind, " ".join(f"`{label}`" for label in metric._labelnames))


def test_every_outcome_and_reason_is_documented() -> None:
    documented = [row[0] for row in rows(section(METRICS, "## Outcomes of handshakes"))][2:]
    assert documented == [f"`{outcome}`" for outcome in Outcome]
    reasons = section(METRICS, "## Reasons of refused messages")
    assert all(f"`{reason}`" in reasons for reason in Reason)
