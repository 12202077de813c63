"""The devices of the registry: add, list, show, update, disable, enable, remove."""

import datetime as dt
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.options import (
    ConfigOption,
    JsonOption,
    KeyFileOption,
    KeyStdinOption,
    LabelOption,
    RealmOption,
    load_settings,
    one_of,
    open_registry,
    parse_labels,
    parse_time,
    read_key,
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

DAYS_MAX = 36_500

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
    key_file: KeyFileOption = None,
    key_stdin: KeyStdinOption = False,
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
    one_of(key_file=key_file, key_stdin=key_stdin)
    if qr and as_json:
        raise typer.BadParameter(
            "it draws on the terminal, where --json prints a document", param_hint="--qr"
        )
    labels = parse_labels(label)
    window = (parse_time(not_before, "--not-before"), parse_time(not_after, "--not-after"))
    settings = load_settings(config)

    from gateway.cli.provision import Provisioning, shared_key, try_commands, warnings
    from gateway.registry.identities import parse_networks
    from gateway.registry.store import NewDevice

    new = NewDevice(
        identity=identity,
        realm=realm,
        group=group,
        labels=labels,
        key=read_key(key_file, key_stdin),
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
    for warning in (*warnings(settings.listeners, added), *shared_key(added.same_key_as)):
        warn(warning)


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
    expiring: Annotated[
        int | None,
        typer.Option(
            metavar="DAYS",
            min=0,
            max=DAYS_MAX,
            help="Only those with a credential that ends within so many days.",
            show_default=False,
        ),
    ] = None,
    idle: Annotated[
        int | None,
        typer.Option(
            metavar="DAYS",
            min=0,
            max=DAYS_MAX,
            help="Only those that were not used, or added, for so many days.",
            show_default=False,
        ),
    ] = None,
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

    now = dt.datetime.now(dt.UTC)
    wanted = DeviceFilter(
        realm=realm,
        group=group,
        labels=labels,
        expiring=None if expiring is None else (now, now + dt.timedelta(days=expiring)),
        unused_since=None if idle is None else now - dt.timedelta(days=idle),
    )
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
    columns = ("identity", "state", "hash", "not_before", "not_after", "created_at", "last_used_at")
    print_table(
        [column.replace("_", " ") for column in columns],
        [[credential[column] for column in columns] for credential in credentials],
    )


@app.command(rich_help_panel=PANEL)
def update_device(
    device: DeviceArgument,
    *,
    realm: RealmOption = "default",
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Its group from now on.", show_default=False)
    ] = None,
    no_group: Annotated[bool, typer.Option("--no-group", help="It has no group.")] = False,
    label: LabelOption = None,
    no_label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Take this label away; may be given several times.", show_default=False
        ),
    ] = None,
    allow_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CIDR",
            help="Let it connect from this network only, in place of those before; may be given several times.",
            show_default=False,
        ),
    ] = None,
    allow_from_anywhere: Annotated[
        bool, typer.Option("--allow-from-anywhere", help="Let it connect from every network.")
    ] = False,
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="IDENTITY",
            help="Whose window to change, when the device has several credentials.",
            show_default=False,
        ),
    ] = None,
    not_before: Annotated[
        str | None, typer.Option(metavar="TIME", help="Refuse it before this time.", show_default=False)
    ] = None,
    no_not_before: Annotated[bool, typer.Option("--no-not-before", help="Let it begin at once.")] = False,
    not_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Refuse it from this time on.", show_default=False)
    ] = None,
    no_not_after: Annotated[bool, typer.Option("--no-not-after", help="Let it never end.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change group, labels or networks of a device, or when a credential is good; sessions that may not be now end."""
    one_of(group=group, no_group=no_group)
    one_of(allow_from=allow_from, allow_from_anywhere=allow_from_anywhere)
    one_of(not_before=not_before, no_not_before=no_not_before)
    one_of(not_after=not_after, no_not_after=no_not_after)
    labels = parse_labels(label)
    window = (parse_time(not_before, "--not-before"), parse_time(not_after, "--not-after"))
    settings = load_settings(config)

    from gateway.registry.devices import DeviceChanges
    from gateway.registry.realms import UNCHANGED

    changes = DeviceChanges(
        group=None if no_group else UNCHANGED if group is None else group,
        labels=labels,
        labels_removed=no_label or (),
        networks=() if allow_from_anywhere else UNCHANGED if allow_from is None else allow_from,
        identity=identity,
        not_before=None if no_not_before else UNCHANGED if window[0] is None else window[0],
        not_after=None if no_not_after else UNCHANGED if window[1] is None else window[1],
    )
    if changes == DeviceChanges():
        raise typer.BadParameter("say what to change: `gatewayctl update-device --help` lists it")
    with open_registry(settings) as registry:
        changed = registry.update_device(realm, device, changes)
        found = registry.device(realm, device)
    if as_json:
        print_json(_document(found))
    else:
        print(f"Changed device {device}." if changed else f"Device {device} was so already.")


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
                "last_used_at": rfc3339(credential.last_used_at),
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
    return "idle" if credential.is_idle else "active"


def _text(value: object) -> str | None:
    """A value of a document for people; None for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items()) or None
    if isinstance(value, list):
        return " ".join(str(each) for each in value) or None
    return None if value is None else str(value)
