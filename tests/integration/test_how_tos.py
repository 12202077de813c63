"""Every command block of docs/how-to is executed, from top to bottom, as it stands there."""

import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import jsonschema
import pytest
import yaml

from gateway.cli.recipes import blocks
from tests.integration.postgresql import PostgresServer
from tests.support.capabilities import missing
from tests.support.pages import PORTS, PageRun
from tests.support.recipes import free_port

ROOT: Final = Path(__file__).parents[2]
HOW_TOS: Final = ROOT / "docs" / "how-to"
CHART: Final = ROOT / "deploy" / "helm" / "psk-gateway"

PAGES: Final = {
    "from-stunnel": ("stunnel", "mosquitto", "mosquitto_pub", "curl"),
    "from-mosquitto": ("mosquitto", "mosquitto_pub", "mosquitto_sub", "mosquitto_passwd"),
    "from-emqx": ("mosquitto", "mosquitto_pub"),
    "rotate-a-fleet": (),
    "kubernetes": (),
    "backup": (),
}
"""The pages that need no database server, with the programs that they call."""

ON_POSTGRESQL: Final = ("postgresql", "several-gateways")

NOT_RUN: Final = {
    # The page runs on SQLite. The same on PostgreSQL is run by the page postgresql.
    "backup": ["mariadb-dump"],
    # There is no cluster here. The chart itself is tried by tests/integration/deploy/test_chart.py.
    "kubernetes": ["kubectl", "helm", "kubectl", "kubectl", "kubectl", "kubectl", "kubectl", "helm"],
}
"""All commands that no test runs, by page: those in blocks of the language `shell`."""


def replaced() -> dict[str, str]:
    return {port: str(free_port()) for port in PORTS}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            missing(f"{program} is not installed")


def test_every_how_to_is_run() -> None:
    assert {page.stem for page in HOW_TOS.glob("*.md")} == {*PAGES, *ON_POSTGRESQL}


@pytest.mark.parametrize("page", [*PAGES, *ON_POSTGRESQL])
def test_what_is_not_run_is_listed(page: str) -> None:
    left_out = []
    for block in blocks((HOW_TOS / f"{page}.md").read_text()):
        if block.language == "shell":
            left_out += [line.split()[0] for line in block.text.splitlines() if not line.startswith(" ")]
        else:
            assert block.language in ("sh", "console") or block.file, f"is not run: {block.text}"
    assert left_out == NOT_RUN.get(page, [])


@pytest.mark.parametrize("page", PAGES)
def test_a_how_to(page: str, tmp_path: Path) -> None:
    need(*PAGES[page])
    PageRun(HOW_TOS / f"{page}.md", tmp_path, replaced()).run()


@pytest.fixture
def database_host(postgres_server: PostgresServer) -> Iterator[str]:
    """Where the PostgreSQL of the pages is; what they make is removed again."""
    yield str(postgres_server.folder)
    postgres_server.administer("DROP DATABASE IF EXISTS registry WITH (FORCE)")
    for role in ("gateway", "registry_owner"):
        postgres_server.administer(f"DROP ROLE IF EXISTS {role}")


@pytest.mark.parametrize("page", ON_POSTGRESQL)
def test_a_how_to_on_postgresql(page: str, tmp_path: Path, database_host: str) -> None:
    need("curl")
    hosts = {"@db.example.org/registry": f"@/registry?host={database_host}", "db.example.org": database_host}
    PageRun(HOW_TOS / f"{page}.md", tmp_path, hosts | replaced()).run()


def test_the_values_of_the_kubernetes_page_are_valid() -> None:
    (text,) = [
        block.text for block in blocks((HOW_TOS / "kubernetes.md").read_text()) if block.language == "yaml"
    ]
    values = yaml.safe_load(text)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    merged = {
        key: {**value, **values[key]} if isinstance(value, dict) and key in values else values.get(key, value)
        for key, value in defaults.items()
    }
    assert set(values) <= set(defaults)
    jsonschema.validate(merged, json.loads((CHART / "values.schema.json").read_text()))
    assert tomllib.loads(values["config"])["routes"][0]["delivery"] == "spooled"
