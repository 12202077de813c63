"""docs/backends.md has every kind with an example that is valid, and leads to its keys in the reference."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter

from gateway.forward.settings import BackendSettings

DOCS = Path(__file__).parents[4] / "docs"
PAGE = (DOCS / "backends.md").read_text()
REFERENCE = (DOCS / "reference" / "configuration.md").read_text()
KINDS: dict[str, type[BaseModel]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model
    for model in get_args(get_args(BackendSettings)[0])
}
TLS_FILES = {"ca_file", "cert_file", "key_file"}


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found.group(1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_leads_to_the_keys(kind: str) -> None:
    assert f"(reference/configuration.md#backendsname-of-kind-{kind})" in section(kind)
    assert f"\n## [backends.NAME] of kind {kind}\n" in REFERENCE


@pytest.mark.parametrize("kind", KINDS)
def test_the_example(kind: str, tmp_path: Path) -> None:
    text = "\n".join(line[4:] for line in section(kind).splitlines() if line.startswith("    "))
    (settings,) = tomllib.loads(text)["backends"].values()
    for key in [key for key in settings if key.endswith("_file") and key not in TLS_FILES]:
        settings[key.removesuffix("_file")] = "a secret of sixteen and more"
        del settings[key]
    parsed: Any = TypeAdapter(BackendSettings).validate_python(settings, context={"base": tmp_path})
    assert parsed.kind == kind
