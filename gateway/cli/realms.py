"""add-realm and list-realms: tenants, each with identities and a hint of its own."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.options import ConfigOption, JsonOption, load_settings, open_registry
from gateway.cli.output import print_json, print_table, rfc3339

if TYPE_CHECKING:
    from gateway.registry.listing import Realm

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel="Realms")
def add_realm(
    name: Annotated[str, typer.Argument(metavar="REALM", help="Name of the new realm.")],
    hint: Annotated[
        str | None,
        typer.Option(
            metavar="HINT",
            help="Identity hint for TLS 1.2 clients. Default: none is sent.",
            show_default=False,
        ),
    ] = None,
    record_bytes_max: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most plaintext bytes of a TLS record to its devices, for small receive buffers. Default: 16384.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a realm."""
    with open_registry(load_settings(config)) as registry:
        realm = registry.add_realm(name, hint=hint, record_bytes_max=record_bytes_max)
    if as_json:
        print_json(_document(realm))
    else:
        print(f"Added realm {realm.name}" + (f" with the hint {realm.hint}." if realm.hint else "."))


@app.command(rich_help_panel="Realms")
def list_realms(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the realms by name."""
    with open_registry(load_settings(config)) as registry:
        realms = registry.realms()
    if as_json:
        print_json([_document(realm) for realm in realms])
    else:
        rows = [
            (
                realm.name,
                realm.hint,
                None if realm.record_bytes_max is None else str(realm.record_bytes_max),
                rfc3339(realm.created_at.replace(microsecond=0)),
            )
            for realm in realms
        ]
        print_table(("realm", "hint", "record bytes", "added"), rows)


def _document(realm: "Realm") -> dict[str, Any]:
    return {
        "realm": realm.name,
        "hint": realm.hint,
        "record_bytes_max": realm.record_bytes_max,
        "created_at": rfc3339(realm.created_at),
    }
