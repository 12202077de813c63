"""The options that commands share, and what they stand for."""

import contextlib
import getpass
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from gateway.errors import ConfigurationError

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.registry.store import Registry

__all__ = [
    "TEXT_BYTES_MAX",
    "ConfigOption",
    "JsonOption",
    "LabelOption",
    "RealmOption",
    "load_settings",
    "open_registry",
    "parse_labels",
    "read_secret_from_stdin",
    "read_text_file",
]

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="Configuration file. Default: $PSKGW_CONFIG, ./gateway.toml or /etc/psk-gateway/gateway.toml.",
        show_default=False,
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.", show_default=False)]

RealmOption = Annotated[str, typer.Option("--realm", metavar="REALM", help="Realm of the device.")]

LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="May be given several times.", show_default=False),
]

TEXT_BYTES_MAX = 4096


def load_settings(config: Path | None) -> "GatewaySettings":
    """The configuration that `--config` or its defaults name."""
    from gateway.config import find_config, load

    return load(find_config(config))


@contextlib.contextmanager
def open_registry(settings: "GatewaySettings") -> "Iterator[Registry]":
    """The registry, written to in the name of the user who runs the command."""
    from gateway.registry.ledger import Author
    from gateway.registry.store import Registry

    with Registry(settings.registry, Author.of_process()) as registry:
        yield registry


def parse_labels(texts: list[str] | None) -> dict[str, str]:
    """`KEY=VALUE` texts as a dictionary."""
    labels: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
        if labels.setdefault(key, value) != value:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--label")
    return labels


def read_text_file(path: Path, what: str) -> str:
    """A short text file, such as one with a key. Raises ConfigurationError when it cannot be read or is long."""
    try:
        with path.open("rb") as file:
            return _read_text(file, f"{what} {path}")
    except OSError as exc:
        raise ConfigurationError(f"{what} {path} cannot be read: {exc.strerror}") from exc


def read_secret_from_stdin(what: str) -> str:
    """A short text from stdin; on a terminal it is asked for and not shown."""
    if sys.stdin.isatty():
        return getpass.getpass(f"{what}: ")
    return _read_text(sys.stdin.buffer, f"{what} on stdin")


def _read_text(file: BinaryIO, name: str) -> str:
    raw = file.read(TEXT_BYTES_MAX + 1)
    if len(raw) > TEXT_BYTES_MAX:
        raise ConfigurationError(f"{name} has more than {TEXT_BYTES_MAX} bytes: is it the right one?")
    return raw.decode("utf-8", "replace")
