"""The realms of the registry: tenants, each with identities, a hint, a source of keys and limits of its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.options import (
    ConfigOption,
    JsonOption,
    load_settings,
    one_of,
    open_registry,
    read_secret_from_stdin,
    read_text_file,
)
from gateway.cli.output import print_fields, print_json, print_table, rfc3339

if TYPE_CHECKING:
    from gateway.registry.listing import Realm
    from gateway.registry.sealing import Key

__all__ = ["app"]

app = typer.Typer()

PANEL = "Realms"
IDLE_DAYS_MAX = 36_500
SESSIONS_MAX = 1_000

RealmArgument = Annotated[str, typer.Argument(metavar="REALM", help="Name of the realm.")]
HintOption = Annotated[
    str | None,
    typer.Option(
        metavar="HINT", help="Identity hint for TLS 1.2 clients. Default: none is sent.", show_default=False
    ),
]
RecordBytesOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Most plaintext bytes of a TLS record to its devices, for small receive buffers. Default: 16384.",
        show_default=False,
    ),
]
EnrollOption = Annotated[
    Literal["registered", "first-use"] | None,
    typer.Option(
        help="first-use: an unknown device that proves its derived key is added. Default: registered.",
        show_default=False,
    ),
]
IdleDaysOption = Annotated[
    int | None,
    typer.Option(
        metavar="DAYS",
        min=1,
        max=IDLE_DAYS_MAX,
        help="Refuse credentials that were not used for longer. Default: never.",
        show_default=False,
    ),
]
SessionsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=SESSIONS_MAX,
        help="Live sessions of one device on a node; one more ends the oldest. Default: limits.sessions_per_device.",
        show_default=False,
    ),
]


@app.command(rich_help_panel=PANEL)
def add_realm(
    name: Annotated[str, typer.Argument(metavar="REALM", help="Name of the new realm.")],
    *,
    hint: HintOption = None,
    key_source: Annotated[
        Literal["stored", "derived-hmac", "derived-hkdf"],
        typer.Option(help="Where keys come from: each stored, or computed from a secret and the identity."),
    ] = "stored",
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the secret of derived keys in hex. Default: it is generated and shown once.",
            show_default=False,
        ),
    ] = None,
    secret_stdin: Annotated[
        bool, typer.Option("--secret-stdin", help="Read the secret in hex from stdin.", show_default=False)
    ] = False,
    record_bytes_max: RecordBytesOption = None,
    enroll: EnrollOption = None,
    idle_days: IdleDaysOption = None,
    sessions_per_device: SessionsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a realm."""
    one_of(secret_file=secret_file, secret_stdin=secret_stdin)
    settings = load_settings(config)

    from gateway.registry.realms import NewRealm

    new = NewRealm(
        name=name,
        hint=hint,
        record_bytes_max=record_bytes_max,
        key_source=key_source,
        secret=_read_secret(secret_file, secret_stdin),
        enroll=enroll or "registered",
        idle_days=idle_days,
        sessions_per_device=sessions_per_device,
    )
    with open_registry(settings) as registry:
        added = registry.found_realm(new)
        realm = registry.realm(name)
    if as_json:
        print_json(_document(realm) | ({} if added.secret is None else {"secret": added.secret.hex()}))
        return
    print(f"Added realm {realm.name}" + (f" with the hint {realm.hint}." if realm.hint else "."))
    if added.secret is not None:
        print(f"Its keys are derived from the secret {added.secret.hex()}\nThe secret is not shown again.")


def _read_secret(secret_file: Path | None, secret_stdin: bool) -> "Key | None":
    from gateway.registry.identities import parse_key_hex

    if secret_file:
        return parse_key_hex(read_text_file(secret_file, "secret file"))
    return parse_key_hex(read_secret_from_stdin("secret in hex")) if secret_stdin else None


@app.command(rich_help_panel=PANEL)
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
                realm.key_source,
                None if realm.record_bytes_max is None else str(realm.record_bytes_max),
                rfc3339(realm.created_at.replace(microsecond=0)),
            )
            for realm in realms
        ]
        print_table(("realm", "hint", "keys", "record bytes", "added"), rows)


@app.command(rich_help_panel=PANEL)
def show_realm(name: RealmArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show a realm and how many devices it has; never its secret."""
    with open_registry(load_settings(config)) as registry:
        document = _document(registry.realm(name))
    if as_json:
        print_json(document)
    else:
        print_fields(
            (key.replace("_", " "), None if value is None else str(value)) for key, value in document.items()
        )


@app.command(rich_help_panel=PANEL)
def update_realm(
    name: RealmArgument,
    *,
    hint: HintOption = None,
    no_hint: Annotated[bool, typer.Option("--no-hint", help="Send no hint.")] = False,
    record_bytes_max: RecordBytesOption = None,
    no_record_bytes_max: Annotated[
        bool, typer.Option("--no-record-bytes-max", help="Records as large as TLS allows.")
    ] = False,
    enroll: EnrollOption = None,
    idle_days: IdleDaysOption = None,
    no_idle_days: Annotated[bool, typer.Option("--no-idle-days", help="Credentials are never idle.")] = False,
    sessions_per_device: SessionsOption = None,
    no_sessions_per_device: Annotated[
        bool, typer.Option("--no-sessions-per-device", help="As limits.sessions_per_device has it.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a realm; running gateways follow at once."""
    one_of(hint=hint, no_hint=no_hint)
    one_of(record_bytes_max=record_bytes_max is not None, no_record_bytes_max=no_record_bytes_max)
    one_of(idle_days=idle_days, no_idle_days=no_idle_days)
    one_of(sessions_per_device=sessions_per_device is not None, no_sessions_per_device=no_sessions_per_device)
    settings = load_settings(config)

    from gateway.registry.realms import UNCHANGED, RealmChanges

    changes = RealmChanges(
        hint=None if no_hint else UNCHANGED if hint is None else hint,
        record_bytes_max=(
            None if no_record_bytes_max else UNCHANGED if record_bytes_max is None else record_bytes_max
        ),
        enroll=UNCHANGED if enroll is None else enroll,
        idle_days=None if no_idle_days else UNCHANGED if idle_days is None else idle_days,
        sessions_per_device=(
            None
            if no_sessions_per_device
            else UNCHANGED
            if sessions_per_device is None
            else sessions_per_device
        ),
    )
    if not changes.given():
        raise typer.BadParameter("say what to change: `gatewayctl update-realm --help` lists it")
    with open_registry(settings) as registry:
        changed = registry.update_realm(name, changes)
        realm = registry.realm(name)
    if as_json:
        print_json(_document(realm))
    else:
        print(f"Changed realm {name}." if changed else f"Realm {name} was so already.")


@app.command(rich_help_panel=PANEL)
def remove_realm(
    name: RealmArgument,
    *,
    with_devices: Annotated[
        bool, typer.Option("--with-devices", help="Remove its devices, too, and end their sessions.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Remove a realm; one that has devices only when that is asked for."""
    with open_registry(load_settings(config)) as registry:
        devices = registry.remove_realm(name, with_devices=with_devices)
    with_them = f" with its {devices:,} devices" if devices > 1 else " with its device" if devices else ""
    print(f"Removed realm {name}{with_them}.")


def _document(realm: "Realm") -> dict[str, Any]:
    document = {
        "realm": realm.name,
        "hint": realm.hint,
        "record_bytes_max": realm.record_bytes_max,
        "key_source": realm.key_source,
        "enroll": realm.enroll,
        "idle_days": realm.idle_days,
        "sessions_per_device": realm.sessions_per_device,
        "created_at": rfc3339(realm.created_at),
    }
    return document if realm.devices is None else document | {"devices": realm.devices}
