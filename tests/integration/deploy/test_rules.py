"""The alert rules: each is tested on made-up series, asks for metrics that exist, and names its page of the runbook."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.gateway import new_gateway, running
from tests.support.peers import program

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "psk-gateway.json"


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        yield from group["rules"]


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_are_well_formed() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "alerts.yml")


def test_each_alert_fires_on_what_it_is_for_and_on_nothing_beside_it() -> None:
    promtool("test", "rules", "alerts_test.yml")
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    for rule in rules():
        expected = [bool(check["exp_alerts"]) for check in checks if check["alertname"] == rule["alert"]]
        assert set(expected) == {True, False}, rule["alert"]


def test_each_alert_names_a_section_of_the_runbook() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for rule in rules():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/runbook.md"
        assert anchor in anchors, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_rules_and_dashboard_ask_for_metrics_that_a_gateway_has(tmp_path: Path) -> None:
    with running(new_gateway(tmp_path / "gateway")) as gateway:
        exposed = set(re.findall(r"^# HELP (\w+)", gateway.http("/metrics")[1], re.MULTILINE))
    asked = set()
    for expression in [*(rule["expr"] for rule in rules()), *expressions(json.loads(DASHBOARD.read_text()))]:
        asked |= set(re.findall(r"\b(?:pskgw|process)_\w+", expression))
    assert len(asked) > 30
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in asked} <= exposed


def expressions(part: Any) -> Iterator[str]:
    """Every query of a dashboard, wherever it stands."""
    if isinstance(part, dict):
        yield from (value for key, value in part.items() if key == "expr")
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from expressions(inner)
