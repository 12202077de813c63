"""README.md and docs/get-started.md are executed as they stand there, `make run` with the real Makefile.

Nothing is installed from a registry of packages: `python3.13 -m venv`, which the Makefile looks for first, gives a `.venv` that leads to
the Python of the tests, and to `pip` a program that does nothing. Whether the package installs is tried by tests/integration/deploy.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

from gateway.cli.recipes import blocks
from gateway.config import load
from tests.support.capabilities import missing
from tests.support.gateway import gatewayctl
from tests.support.pages import PORTS, PageRun
from tests.support.recipes import free_port

ROOT: Final = Path(__file__).parents[2]
GET_STARTED: Final = ROOT / "docs" / "get-started.md"
README: Final = ROOT / "README.md"

NOT_RUN: Final = {
    GET_STARTED: ["git", "cd"],  # the page is run in a copy of the project
    # Of these, `make run` is a block of its own; `make test` and `make check` run what runs this.
    README: ["pip", "make", "make", "make", "make", "make", "make"],
}
"""All commands of the pages that no test runs: those in blocks of the language `shell`."""


class FirstSteps(PageRun):
    """A page in a fresh clone."""

    def __init__(self, page: Path, folder: Path) -> None:
        ports = {port: str(free_port()) for port in PORTS}
        super().__init__(page, folder, {"/srv/gateway": str(folder / "srv")} | ports)
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        programs = folder / ".bin"
        (programs / "venv-python").write_text(
            f'#!/bin/bash\ncase "$2" in pip) exit ;; esac\nexec {sys.executable} "$@"\n'
        )
        (programs / "python3.13").write_text(
            f'#!/bin/bash\n[ "$2" = venv ] || exec {sys.executable} "$@"\nmkdir -p .venv/bin\n'
            f"ln -s {programs}/venv-python .venv/bin/python\nln -s {programs}/gatewayctl .venv/bin/gatewayctl\n"
        )
        for program in programs.iterdir():
            program.chmod(0o700)


@pytest.mark.parametrize("page", [GET_STARTED, README], ids=["get-started", "README"])
def test_the_first_steps(page: Path, tmp_path: Path) -> None:
    for program in ("make", "curl", "openssl"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed")
    FirstSteps(page, tmp_path).run()


@pytest.mark.parametrize("page", NOT_RUN, ids=["get-started", "README"])
def test_what_is_not_run_is_listed(page: Path) -> None:
    left_out = []
    for block in blocks(page.read_text()):
        if block.language == "shell":
            left_out += [line.split()[0] for line in block.text.splitlines()]
        else:
            assert block.language in ("sh", "console", "text", "toml"), f"is not run: {block.text}"
    assert left_out == NOT_RUN[page]


def test_the_routes_of_the_readme_are_valid(tmp_path: Path) -> None:
    gatewayctl("init", tmp_path / "gateway")
    config = tmp_path / "gateway" / "gateway.toml"
    (routes,) = [block.text for block in blocks(README.read_text()) if block.language == "toml"]
    config.write_text(config.read_text().partition("[[routes]]")[0] + routes)
    assert [route.name for route in load(config).routes] == re.findall(
        r'^name = "(.*)"', routes, re.MULTILINE
    )
