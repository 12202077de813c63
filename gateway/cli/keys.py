"""The life of keys: rotate-key, revoke-key, reseal-keys."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.options import (
    ConfigOption,
    JsonOption,
    KeyFileOption,
    KeyStdinOption,
    RealmOption,
    load_settings,
    one_of,
    open_registry,
    parse_duration,
    parse_time,
    read_key,
)
from gateway.cli.output import print_fields, print_json, rfc3339, warn

if TYPE_CHECKING:
    from gateway.registry.resealing import ResealProgress
    from gateway.registry.store import Registry

__all__ = ["app"]

app = typer.Typer()

PANEL = "Keys"


@app.command(rich_help_panel=PANEL)
def rotate_key(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")],
    *,
    realm: RealmOption = "default",
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="IDENTITY",
            help="The new identity. Default: the device's name with a number, as in meter-1.2.",
            show_default=False,
        ),
    ] = None,
    grace: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long the old identity is still accepted (units s m h d)."),
    ] = "30d",
    not_after: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Refuse the new one from this time on.", show_default=False),
    ] = None,
    key_file: KeyFileOption = None,
    key_stdin: KeyStdinOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a device a new identity and key beside the old, which end after the grace time; prints the key once."""
    one_of(key_file=key_file, key_stdin=key_stdin)
    until = parse_duration(grace, "--grace")
    window_end = parse_time(not_after, "--not-after")
    settings = load_settings(config)

    from gateway.cli.provision import shared_key
    from gateway.registry.credentials import NewCredential

    new = NewCredential(
        identity=identity, key=read_key(key_file, key_stdin), grace=until, not_after=window_end
    )
    with open_registry(settings) as registry:
        rotated = registry.rotate_key(realm, device, new)
    document = {
        "realm": rotated.realm,
        "device": rotated.device,
        "identity": rotated.identity,
        "key": rotated.key.hex(),
        "hint": rotated.hint,
        "not_after": rfc3339(rotated.not_after),
        "old": [{"identity": old, "not_after": rfc3339(end)} for old, end in rotated.old],
    }
    if as_json:
        print_json(document)
    else:
        old = document.pop("old")
        assert isinstance(old, list)
        print_fields(
            (name.replace("_", " "), value) for name, value in document.items() if not isinstance(value, list)
        )
        print("\nThe key is not shown again.")
        for each in old:
            print(f"{each['identity']} is accepted until {each['not_after']}.")
    for warning in shared_key(rotated.same_key_as):
        warn(warning)


@app.command(rich_help_panel=PANEL)
def revoke_key(
    identity: Annotated[str, typer.Argument(metavar="IDENTITY", help="The identity to refuse.")],
    realm: RealmOption = "default",
    config: ConfigOption = None,
) -> None:
    """Refuse one identity from now on, and end its sessions; others of its device stay."""
    with open_registry(load_settings(config)) as registry:
        device = registry.revoke_key(realm, identity)
    print(f"Revoked {identity} of device {device}." if device else f"{identity} was revoked already.")


@app.command(rich_help_panel=PANEL)
def reseal_keys(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Seal every key under the first master key, while gateways run; interrupted, it goes on where it was."""
    with open_registry(load_settings(config)) as registry:
        last = _show_progress(registry)
    if as_json:
        print_json({"credentials": last.seen, "resealed": last.resealed})
    else:
        print(
            f"Sealed {last.resealed:,} keys anew. Everything is sealed under the first master key now: "
            "the others can be taken away."
        )


def _show_progress(registry: "Registry") -> "ResealProgress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        "resealing",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("resealing")
        for step in registry.reseal():
            progress.update(task, completed=step.seen, total=step.total)
    return step
