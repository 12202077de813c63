"""What mkdocs needs to show pages that are written for the repository.

- Links to files outside docs/ (the changelog, what is in deploy/) go to pages of the site where there is one, and become plain
  code where there is none: the site has no address of a repository to point at.
- The first line of a code block may name a file after its language (```toml gateway.toml), or say `terminal`,
  `stop` or `later`; on the site that is its title.
"""

import re
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[2]
TOP_PAGES: Final = {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
    "README.md": "index.md",
}
"""Pages at the top of the repository, and their names on the site."""

TITLES: Final = {
    "terminal": "in a terminal of its own",
    "stop": "end this one, with Ctrl-C",
    "later": "a little later",
}
FENCE: Final = re.compile(r"^```(?P<language>\w+) (?P<title>\S+)$", re.MULTILINE)
LINK: Final = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<target>[^)#]+)(?P<anchor>#[^)]*)?\)")
OUTSIDE: Final = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>(?:\.\./)+[^)#]*)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top of the repository that are not written for the site as well."""
    for name, on_site in TOP_PAGES.items():
        if (ROOT / name).exists() and files.get_file_from_path(on_site) is None:
            text = LINK.sub(_from_the_top, (ROOT / name).read_text("utf-8"))
            files.append(File.generated(config, on_site, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page as the site has it."""
    del config, files
    folder = (ROOT / "docs" / page.file.src_uri).parent
    return FENCE.sub(_titled, OUTSIDE.sub(lambda found: _inside(found, folder), markdown))


def _titled(fence: re.Match[str]) -> str:
    return f'```{fence["language"]} title="{TITLES.get(fence["title"], fence["title"])}"'


def _from_the_top(link: re.Match[str]) -> str:
    """A link of a page at the top of the repository, as one of the site; or its text, when it leads to no page of the site."""
    target = link["target"]
    if not target.startswith("docs/") and target not in TOP_PAGES:
        return link["text"]
    on_site = TOP_PAGES.get(target, target.removeprefix("docs/"))
    return f"[{link['text']}]({on_site}{link['anchor'] or ''})"


def _inside(link: re.Match[str], folder: Path) -> str:
    """The link, when it stays in docs/; to the page of the site; or its text, when there is none."""
    target = (folder / link["target"]).resolve()
    docs = ROOT / "docs"
    if target.is_relative_to(docs):
        return link[0]
    name = str(target.relative_to(ROOT))
    if name not in TOP_PAGES:
        return link["text"]
    up = "../" * len(folder.relative_to(docs).parts)
    return f"[{link['text']}]({up}{TOP_PAGES[name]}{link['anchor'] or ''})"
