"""check-config: what would be in force."""

import json
from typing import Any

import typer

from gateway.cli.options import ConfigOption, JsonOption
from gateway.cli.output import print_json

__all__ = ["app", "to_toml"]

app = typer.Typer()


@app.command(rich_help_panel="Set up")
def check_config(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check the configuration as `run` does, and print what is in force, defaults included, secrets masked."""
    from gateway.config import effective, find_config, load

    path = find_config(config)
    tree = effective(load(path))
    if as_json:
        print_json(tree)
    else:
        print(f"# {path} is valid. In force, with defaults and environment:\n")
        print(to_toml(tree))


def to_toml(tree: dict[str, Any]) -> str:
    """A tree of tables, lists of tables and plain values as TOML."""
    return "\n\n".join(_tables(tree, ""))


def _tables(table: dict[str, Any], name: str) -> list[str]:
    lines = [
        f"{_key(key)} = {_value(value)}"
        for key, value in table.items()
        if not _has_own_tables(key, value, name)
    ]
    texts = ["\n".join([f"[{name}]", *lines] if name else lines)] if lines else []
    for key, value in table.items():
        if not _has_own_tables(key, value, name):
            continue
        full = f"{name}.{_key(key)}" if name else _key(key)
        if isinstance(value, dict):
            texts += _tables(value, full)
        else:
            texts += [
                "\n".join([f"[[{full}]]", *(f"{_key(k)} = {_value(v)}" for k, v in each.items())])
                for each in value
            ]
    return texts


def _has_own_tables(_key: str, value: Any, name: str) -> bool:
    """Whether a value is written as [table] or [[table]]: the sections of the file, and the backends."""
    if isinstance(value, dict):
        return name in {"", "backends"}
    return name == "" and isinstance(value, list)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(each) for each in value)}]"
    return json.dumps(value)  # texts, numbers and booleans are written alike
