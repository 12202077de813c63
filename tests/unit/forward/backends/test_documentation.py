"""docs/backends.md has every kind with every key, its default, and examples that are valid."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter

from gateway.forward.settings import BackendSettings

PAGE = (Path(__file__).parents[4] / "docs" / "backends.md").read_text()
KINDS: dict[str, type[BaseModel]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model
    for model in get_args(get_args(BackendSettings)[0])
}
SHARED = {"ca_file", "cert_file", "key_file", "username", "password"}


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found.group(1)


def rows(text: str) -> dict[str, list[str]]:
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row] for row in cells}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_with_its_default(kind: str) -> None:
    fields = {name: field for name, field in KINDS[kind].model_fields.items() if name != "kind"}
    documented = rows(section(kind))
    shared = rows(section("What several kinds share"))
    assert set(documented) | (SHARED & set(fields)) == set(fields)
    for name, field in fields.items():
        _, _, default, meaning = documented.get(name) or shared[name]
        assert meaning.replace("\\|", "|") == field.description
        if field.is_required():
            assert default == "required", name
        elif isinstance(field.default, str | int | float):
            assert tomllib.loads(f"x = {default}")["x"] == field.default, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_example(kind: str, tmp_path: Path) -> None:
    text = "\n".join(line[4:] for line in section(kind).splitlines() if line.startswith("    "))
    (settings,) = tomllib.loads(text)["backends"].values()
    for key in [key for key in settings if key.endswith("_file") and key not in SHARED]:
        settings[key.removesuffix("_file")] = "a secret of sixteen and more"
        del settings[key]
    parsed: Any = TypeAdapter(BackendSettings).validate_python(settings, context={"base": tmp_path})
    assert parsed.kind == kind
