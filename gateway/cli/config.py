"""check-config: what would be in force."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.options import ConfigOption, JsonOption
from gateway.cli.output import print_json

if TYPE_CHECKING:
    from gateway.config import GatewaySettings

__all__ = ["app", "to_toml"]

app = typer.Typer()


@app.command(rich_help_panel="Set up")
def check_config(
    for_upgrade: Annotated[
        bool,
        typer.Option(
            "--for-upgrade", help="See also whether a running gateway can be upgraded to this program."
        ),
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the configuration as `run` does, and print what is in force, defaults included, secrets masked."""
    from gateway.config import effective, find_config, load

    path = find_config(config)
    settings = load(path)
    if for_upgrade:
        _check_for_upgrade(settings)
    tree = effective(settings)
    if as_json:
        print_json(tree)
    else:
        print(f"# {path} is valid. In force, with defaults and environment:\n")
        print(to_toml(tree))


def _check_for_upgrade(settings: "GatewaySettings") -> None:
    """Whether this program is whole, knows what a running one hands over, and the registry or else its replica."""
    from gateway.errors import ConfigurationError, RegistryUnavailable
    from gateway.registry.ledger import Author
    from gateway.registry.store import Registry
    from gateway.server.supervision.upgrade import check_format

    for module in ("supervision.supervisor", "processes.worker", "processes.follower"):
        importlib.import_module(f"gateway.server.{module}")
    check_format()
    try:
        with Registry(settings.registry, Author.of_process()):
            pass
    except RegistryUnavailable as exc:
        if not _has_replica(settings.node.data_dir / "replica"):
            raise ConfigurationError(
                f"the registry is away, and there is no replica here that this program can read: upgrade when it is back ({exc})"
            ) from exc


def _has_replica(folder: Path) -> bool:
    """Whether there is a replica in the format of this program."""
    from gateway.errors import RegistryError
    from gateway.registry.replica import ReplicaReader, current_generation

    generation = current_generation(folder)
    if generation is None:
        return False
    try:
        with ReplicaReader.open(generation) as reader:
            return reader.meta() is not None
    except RegistryError:
        return False


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
