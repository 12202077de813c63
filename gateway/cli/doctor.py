"""doctor: is everything that `run` needs well?"""

import typer

from gateway.cli.options import ConfigOption, JsonOption
from gateway.cli.output import print_json

__all__ = ["app"]

app = typer.Typer()

MARKS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


@app.command(rich_help_panel="Set up")
def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Look at configuration, files, registry, replica, ports, clock, TLS and every backend; say how to repair.

    Changes nothing. Exit status 1 when something is wrong; warnings are not.
    """
    from msgspec import to_builtins

    from gateway.cli.checks import examine
    from gateway.config import find_config

    findings = []
    for finding in examine(find_config(config)):
        findings.append(finding)
        if as_json:
            continue
        print(f"{MARKS[finding.status]}  {finding.check}: {finding.detail}")
        if finding.fix:
            print(f"         fix: {finding.fix}")
    if as_json:
        print_json([to_builtins(finding) for finding in findings])
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)
