"""docs/reference is what the code says, and the code says something about each command, option, setting, metric and error."""

import re
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from typer.main import get_command

from docs.generate import FOLDER, pages
from gateway import errors
from gateway.cli import root_app
from gateway.config import GatewaySettings
from gateway.telemetry.metrics import FollowerMetrics, Outcome, SupervisorMetrics, WorkerMetrics
from gateway.wire.framing import Reason

PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_pages_are_those_of_the_code(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == PAGES[name], "run `make reference` and commit what it writes"


def test_there_are_no_other_pages() -> None:
    assert {page.name for page in FOLDER.glob("*.md")} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_without_a_meaning(name: str) -> None:
    rows = [
        line
        for line in PAGES[name].splitlines()
        if line.startswith("| `") and not line.startswith("| `kind` |")
    ]
    assert len(rows) > 10
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_command_and_option_is_there() -> None:
    tree: dict[str, Any] = cast("Any", get_command(root_app())).commands
    for name, command in tree.items():
        text = PAGES["commands.md"].partition(f"\n### {name}\n")[2].partition("\n### ")[0].replace("\\|", "|")
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
            assert all(f"`{each}" in text for each in [*names, *parameter.secondary_opts]), (
                name,
                parameter.name,
            )


def test_every_table_of_the_settings_is_there() -> None:
    for name, field in GatewaySettings.model_fields.items():
        heading = (
            name
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            else f"[{name}]"
        )
        heading = "backends.NAME" if name == "backends" else heading
        assert f"\n## [{heading}]" in PAGES["configuration.md"], name


def test_every_metric_that_a_process_registers_is_there() -> None:
    worker, follower, supervisor = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    WorkerMetrics(worker)
    FollowerMetrics(follower)
    SupervisorMetrics(supervisor, version="", python="", openssl="")
    families = [family for each in (worker, follower, supervisor) for family in each.collect()]
    registered = [family.name + ("_total" if family.type == "counter" else "") for family in families]
    documented = re.findall(r"^\| `(pskgw_\w+)` \|", PAGES["metrics.md"], re.MULTILINE)
    assert sorted(documented) == sorted(name for name in registered if name.startswith("pskgw_"))


def test_every_error_and_word_is_there() -> None:
    page = PAGES["errors.md"]
    assert all(f"| `{name}` |" in page for name in errors.__all__ if name != "PeerFault")
    assert all(f"`{word}`" in page for word in [*Outcome, *Reason])
