"""The documentation as a site: built without a warning, every link leads somewhere, nothing comes from another host."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[3]
DOCS: Final = ROOT / "docs"
LINK: Final = re.compile(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            DOCS / "site" / "mkdocs.yml",
            "-d",
            folder,
        ],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loads = re.compile(
        r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?(?:https?:)?//|<link\b[^>]*\bhref="?(?:https?:)?//'
    )
    for page in pages:
        found = loads.search(page.read_text())
        assert found is None, f"{page}: {found[0] if found else ''}"


def test_blocks_with_a_name_are_shown_as_code(site: Path) -> None:
    text = (site / "how-to" / "from-stunnel.html").read_text()
    assert '<span class="filename">stunnel.conf</span>' in text
    assert '<span class="filename">in a terminal of its own</span>' in text


def test_every_link_leads_to_a_file_of_the_repository() -> None:
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link['target']}"
        for page in pages
        for link in LINK.finditer(page.read_text())
        if not (page.parent / link["target"]).exists()
    ]
    assert broken == []
