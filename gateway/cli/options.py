"""The options that commands share, and what they stand for."""

import contextlib
import datetime as dt
import getpass
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from gateway.errors import ConfigurationError, RegistryRefused

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.registry.sealing import Key
    from gateway.registry.store import Registry

__all__ = [
    "TEXT_BYTES_MAX",
    "ConfigOption",
    "JsonOption",
    "KeyFileOption",
    "KeyStdinOption",
    "LabelOption",
    "RealmOption",
    "load_settings",
    "one_of",
    "open_registry",
    "parse_duration",
    "parse_labels",
    "parse_time",
    "read_key",
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

KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="File with the key in hex. Default: a key is generated.", show_default=False
    ),
]

KeyStdinOption = Annotated[
    bool, typer.Option("--key-stdin", help="Read the key in hex from stdin.", show_default=False)
]

TEXT_BYTES_MAX = 4096
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION_MAX_S = 100 * 365 * 86_400


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


def parse_time(text: str | None, option: str) -> dt.datetime | None:
    """A time with its zone, or a date, which begins at midnight UTC."""
    from gateway.registry.identities import parse_time as parse

    try:
        return None if text is None else parse(text)
    except RegistryRefused as exc:
        raise typer.BadParameter(str(exc), param_hint=option) from exc


def parse_duration(text: str, option: str) -> dt.timedelta:
    """A number with its unit: s, m, h or d."""
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and unit in _UNITS_S):
        raise typer.BadParameter(
            f"{text!r} is not a duration: write a number with s, m, h or d, as in 30d", param_hint=option
        )
    seconds = int(number) * _UNITS_S[unit]
    if seconds > _DURATION_MAX_S:
        raise typer.BadParameter(f"{text!r} is longer than 100 years", param_hint=option)
    return dt.timedelta(seconds=seconds)


def one_of(**given: object) -> None:
    """Refuse options that exclude each other: names (with _ for -) and whether each was given."""
    names = ["--" + name.replace("_", "-") for name, value in given.items() if value]
    if len(names) > 1:
        raise typer.BadParameter(f"give {' or '.join(names)}, not both", param_hint=names[-1])


def read_key(key_file: Path | None, key_stdin: bool) -> "Key | None":
    """The key that was given as a file or on stdin, in hex; None when none was."""
    from gateway.registry.identities import parse_key_hex

    if key_file:
        return parse_key_hex(read_text_file(key_file, "key file"))
    return parse_key_hex(read_secret_from_stdin("key in hex")) if key_stdin else None


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
