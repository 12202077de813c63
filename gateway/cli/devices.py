"""The devices of the registry: add, list, show, disable, enable, remove."""

import datetime as dt
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.options import (
    ConfigOption,
    JsonOption,
    LabelOption,
    RealmOption,
    load_settings,
    open_registry,
    parse_labels,
    read_secret_from_stdin,
    read_text_file,
)
from gateway.cli.output import print_fields, print_json, print_json_array, print_table, remark, rfc3339, warn

if TYPE_CHECKING:
    from gateway.registry.listing import Credential, Device, DeviceFilter
    from gateway.registry.store import Registry

__all__ = ["app"]

app = typer.Typer()

PANEL = "Devices"
ROWS_SHOWN = 1_000
"""How many devices a table shows unless it is told: more than anybody reads on a terminal."""

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")]


@app.command(rich_help_panel=PANEL)
def add_device(
    identity: Annotated[
        str, typer.Argument(metavar="IDENTITY", help="PSK identity, 1 to 128 bytes; also the device's name.")
    ],
    *,
    realm: RealmOption = "default",
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Group, for routes to match.", show_default=False)
    ] = None,
    label: LabelOption = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with the key in hex. Default: a key is generated.", show_default=False
        ),
    ] = None,
    key_stdin: Annotated[
        bool, typer.Option("--key-stdin", help="Read the key in hex from stdin.", show_default=False)
    ] = False,
    not_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Refuse it before this time (RFC 3339, or a date).", show_default=False
        ),
    ] = None,
    not_after: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Refuse it from this time on (RFC 3339, or a date).", show_default=False
        ),
    ] = None,
    allow_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CIDR",
            help="Let it connect from this network only; may be given several times.",
            show_default=False,
        ),
    ] = None,
    hash_name: Annotated[
        Literal["sha256", "sha384"],
        typer.Option("--hash", help="Hash that the key is bound to in TLS 1.3; TLS 1.2 takes either."),
    ] = "sha256",
    qr: Annotated[
        bool,
        typer.Option("--qr", help="Draw identity, key and address as a QR code too.", show_default=False),
    ] = False,
    client: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="CLIENT",
            help="Print how to connect with this client: openssl, mosquitto, esp-idf, zephyr, ...",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write what the device needs into this folder: JSON, C header, CSV for ESP-IDF's NVS.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Where the device reaches the gateway, for --for, --bundle and --qr. Default: as the listener says.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a device and print its key: the only time that it is shown."""
    if key_file and key_stdin:
        raise typer.BadParameter("give --key-file or --key-stdin, not both", param_hint="--key-stdin")
    if qr and as_json:
        raise typer.BadParameter(
            "it draws on the terminal, where --json prints a document", param_hint="--qr"
        )
    labels = parse_labels(label)
    window = (_parse_time(not_before, "--not-before"), _parse_time(not_after, "--not-after"))
    settings = load_settings(config)

    from gateway.cli.provision import Provisioning, try_commands, warnings
    from gateway.registry.identities import parse_key_hex, parse_networks
    from gateway.registry.store import NewDevice

    key_text = (
        read_text_file(key_file, "key file")
        if key_file
        else read_secret_from_stdin("key in hex")
        if key_stdin
        else None
    )
    new = NewDevice(
        identity=identity,
        realm=realm,
        group=group,
        labels=labels,
        key=None if key_text is None else parse_key_hex(key_text),
        not_before=window[0],
        not_after=window[1],
        networks=parse_networks(allow_from or ()),
        hash=hash_name,
    )
    provisioning = Provisioning(settings.listeners, settings.node.name, host, client, bundle)
    provisioning.check(realm)
    with open_registry(settings) as registry:
        added = registry.add_device(new)

    recipe = provisioning.recipe(added, hash_name)
    document = {
        "realm": added.realm,
        "device": added.device,
        "identity": added.identity,
        "key": added.key.hex(),
        "hint": added.hint,
        "group": added.group,
        "labels": added.labels,
        "hash": new.hash,
        "not_before": rfc3339(window[0]),
        "not_after": rfc3339(window[1]),
        "allow_from": list(new.networks),
    }
    if as_json:
        print_json(document | ({"recipe": recipe} if recipe else {}))
    else:
        print_fields((name.replace("_", " "), _text(value)) for name, value in document.items())
        print("\nThe key is not shown again.")
        if recipe:
            print(f"\n{recipe}")
        elif commands := try_commands(settings.listeners, added, key_file):
            print("To try it while the gateway runs:", *commands, sep="\n  ")
    if qr:
        provisioning.draw_qr(added, hash_name)
    for path in provisioning.write(added, hash_name):
        remark(f"Wrote {path}.")
    for warning in warnings(settings.listeners, added):
        warn(warning)


def _parse_time(text: str | None, option: str) -> dt.datetime | None:
    """A time with its zone, or a date, which begins at midnight UTC."""
    if text is None:
        return None
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is not None and when.tzinfo is None and len(text) == len("2027-01-31"):
        when = when.replace(tzinfo=dt.UTC)
    if when is None or when.tzinfo is None:
        raise typer.BadParameter(
            f"{text!r} is not a time: write 2027-01-31T12:00:00Z, or 2027-01-31 for midnight UTC",
            param_hint=option,
        )
    return when.astimezone(dt.UTC)


@app.command(rich_help_panel=PANEL)
def list_devices(
    *,
    realm: Annotated[
        str | None, typer.Option(metavar="REALM", help="Only devices of this realm.", show_default=False)
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Only devices of this group.", show_default=False)
    ] = None,
    label: LabelOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help=f"At most N devices. Default: {ROWS_SHOWN}, with --json all.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        int,
        typer.Option(metavar="ID", min=0, help="Go on after the device with this id.", show_default=False),
    ] = 0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List devices in the order they were added."""
    labels = parse_labels(label)
    settings = load_settings(config)

    from gateway.registry.listing import DeviceFilter

    wanted = DeviceFilter(realm=realm, group=group, labels=labels)
    with open_registry(settings) as registry:
        devices = _devices(registry, wanted, after)
        if as_json:
            print_json_array(_document(device) for device in itertools.islice(devices, limit))
            return
        page = list(itertools.islice(devices, limit or ROWS_SHOWN))
        is_last_page = next(devices, None) is None
    print_table(
        ("realm", "device", "group", "state", "added", "labels"),
        [
            (
                device.realm,
                device.name,
                device.group,
                _device_state(device),
                rfc3339(device.created_at.replace(microsecond=0)),
                _text(device.labels),
            )
            for device in page
        ],
    )
    if not is_last_page:
        remark(f"There are more devices: go on with --after {page[-1].id}.")


def _devices(registry: "Registry", wanted: "DeviceFilter", after: int) -> "Iterator[Device]":
    while page := registry.devices(wanted, after=after):
        yield from page
        after = page[-1].id


@app.command(rich_help_panel=PANEL)
def show_device(
    device: DeviceArgument,
    realm: RealmOption = "default",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a device and its credentials; never a key."""
    with open_registry(load_settings(config)) as registry:
        found = registry.device(realm, device)
    document = _document(found)
    if as_json:
        print_json(document)
        return
    credentials = document.pop("credentials")
    print_fields((name.replace("_", " "), _text(value)) for name, value in document.items())
    print()
    columns = ("identity", "state", "hash", "not_before", "not_after", "created_at")
    print_table(
        [column.replace("_", " ") for column in columns],
        [[credential[column] for column in columns] for credential in credentials],
    )


@app.command(rich_help_panel=PANEL)
def disable_device(
    device: DeviceArgument, realm: RealmOption = "default", config: ConfigOption = None
) -> None:
    """Refuse a device from now on and end its sessions; it keeps its credentials."""
    _set_enabled(device, realm, config, enabled=False)


@app.command(rich_help_panel=PANEL)
def enable_device(
    device: DeviceArgument, realm: RealmOption = "default", config: ConfigOption = None
) -> None:
    """Let a disabled device connect again."""
    _set_enabled(device, realm, config, enabled=True)


def _set_enabled(device: str, realm: str, config: Path | None, *, enabled: bool) -> None:
    with open_registry(load_settings(config)) as registry:
        changed = registry.set_device_enabled(realm, device, enabled=enabled)
    state = "enabled" if enabled else "disabled"
    print(f"Device {device} is {state}." if changed else f"Device {device} was {state} already.")


@app.command(rich_help_panel=PANEL)
def remove_device(
    device: DeviceArgument, realm: RealmOption = "default", config: ConfigOption = None
) -> None:
    """Remove a device and its credentials, and end its sessions."""
    with open_registry(load_settings(config)) as registry:
        registry.remove_device(realm, device)
    print(f"Removed device {device}.")


def _document(device: "Device") -> dict[str, Any]:
    return {
        "id": device.id,
        "realm": device.realm,
        "device": device.name,
        "enabled": not device.disabled,
        "state": _device_state(device),
        "group": device.group,
        "labels": device.labels,
        "allow_from": list(device.networks),
        "created_at": rfc3339(device.created_at),
        "credentials": [
            {
                "identity": credential.identity,
                "state": _credential_state(credential),
                "hash": credential.hash,
                "not_before": rfc3339(credential.not_before),
                "not_after": rfc3339(credential.not_after),
                "revoked_at": rfc3339(credential.revoked_at),
                "created_at": rfc3339(credential.created_at),
            }
            for credential in device.credentials
        ],
    }


def _device_state(device: "Device") -> str:
    """`active` when one of its credentials would be accepted now, else why not."""
    if device.disabled:
        return "disabled"
    states = [_credential_state(credential) for credential in device.credentials]
    return "active" if "active" in states else next(iter(states), "no credential")


def _credential_state(credential: "Credential") -> str:
    now = dt.datetime.now(dt.UTC)
    if credential.revoked_at is not None:
        return "revoked"
    if credential.not_before is not None and now < credential.not_before:
        return "not_yet_valid"
    if credential.not_after is not None and now >= credential.not_after:
        return "expired"
    return "active"


def _text(value: object) -> str | None:
    """A value of a document for people; None for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items()) or None
    if isinstance(value, list):
        return " ".join(str(each) for each in value) or None
    return None if value is None else str(value)
