"""The recipes of docs/devices, filled in for one device.

A page is written for an example: this gateway, this identity, this key. Filling it in replaces those inside its code
blocks, each as the block's language needs it quoted, and a block `device.h` by the header of the device. What the tests
run are pages that were filled in here.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from gateway.cli.bundle import Access, c_header, c_text
from gateway.registry.sealing import Key

__all__ = ["EXAMPLE", "Block", "blocks", "filled_in", "recipe", "recipe_names"]

EXAMPLE: Final = Access(
    realm="default",
    device="sensor-17",
    identity="sensor-17",
    key=Key(bytes.fromhex("00112233445566778899aabbccddeeff" * 2)),
    host="gateway.example.org",
    port=8883,
    server_name=None,
    hint=None,
    hash="sha256",
    suites=("TLS_AES_128_GCM_SHA256", "ECDHE-PSK-CHACHA20-POLY1305", "PSK-AES128-GCM-SHA256"),
)
_FENCE: Final = re.compile(r"```(?P<language>\w*) ?(?P<file>.*)\n(?P<text>(?:.*\n)*?)```\n")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A code block: a file to be written when it has a name, else commands."""

    language: str
    file: str
    text: str


def recipe_names() -> list[str]:
    """What `--for` may be given."""
    return sorted(page.stem for page in _pages().glob("*.md") if page.stem != "README")


def recipe(name: str, access: Access) -> str:
    """The page `name`, one of `recipe_names`, for this device, in Markdown."""
    return filled_in((_pages() / f"{name}.md").read_text("utf-8"), access)


def _pages() -> Path:
    """The recipes: inside the package when it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "docs" / "devices"


def blocks(page: str) -> Iterator[Block]:
    """The code blocks of a page, in order."""
    for found in _FENCE.finditer(page):
        yield Block(found["language"], found["file"], found["text"])


def filled_in(page: str, access: Access) -> str:
    """The page with this device in place of the example."""
    return _FENCE.sub(lambda found: _filled_block(found, access), page)


def _filled_block(found: re.Match[str], access: Access) -> str:
    if found["file"] == "device.h":
        return f"```{found['language']} device.h\n{c_header(access)}```\n"
    quote = _QUOTES.get(found["language"], _json_text)
    values = {
        EXAMPLE.host: quote(access.host),
        EXAMPLE.identity: quote(access.identity),
        EXAMPLE.key.hex(): access.key.hex(),
        str(EXAMPLE.port): str(access.port),
    }
    pattern = "|".join(map(re.escape, values))
    return re.sub(pattern, lambda value: values[value[0]], found[0])


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_QUOTES: Final[dict[str, Callable[[str], str]]] = {"sh": shlex.quote, "c": c_text}
"""In a shell the example stands bare, elsewhere between double quotes."""
