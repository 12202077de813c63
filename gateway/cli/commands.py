"""send-, list- and cancel-command(s): to a connected device, or kept until it connects."""

import base64
import datetime as dt
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.live import ask
from gateway.cli.options import ConfigOption, JsonOption, RealmOption, load_settings, open_registry
from gateway.cli.output import print_json, print_table, rfc3339
from gateway.errors import ControlError

if TYPE_CHECKING:
    from gateway.registry.commands import WaitingCommand

__all__ = ["app"]

app = typer.Typer()

PANEL = "Live sessions"
PAYLOAD_BYTES_MAX = 16 * 1024 * 1024
"""As much as a message of a device may have."""
TTL_DEFAULT = "7d"
TTL_MAX = dt.timedelta(days=366)
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
ANSWER_S = 10.0
"""What the gateway may take beyond the time that the device has."""


@app.command(rich_help_panel=PANEL)
def send_command(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")],
    payload: Annotated[
        str | None,
        typer.Argument(metavar="[PAYLOAD]", help="What to send. Default: stdin.", show_default=False),
    ] = None,
    *,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Send what is in this file.", show_default=False),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.1, max=3600, help="How long the device has to acknowledge it."),
    ] = 10.0,
    queue: Annotated[
        bool,
        typer.Option(
            "--queue",
            help="Keep it in the registry until the device connects, to any node.",
            show_default=False,
        ),
    ] = False,
    ttl: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help=f"With --queue: how long it is kept, such as 30m, 12h or 7d. Default: {TTL_DEFAULT}.",
            show_default=False,
        ),
    ] = None,
    realm: RealmOption = "default",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a command to a device. Done once the device's TCP has acknowledged all of it, or with --queue once it is kept."""
    if ttl is not None and not queue:
        raise typer.BadParameter("it goes with --queue", param_hint="--ttl")
    if payload is not None and file is not None:
        raise typer.BadParameter("give PAYLOAD or --file, not both", param_hint="--file")
    lifetime = _parse_ttl(TTL_DEFAULT if ttl is None else ttl)
    content = _read_payload(payload, file)

    from gateway.forward.message import UUID7_RANDOM_BITS, uuid7

    command_id = uuid7(time.time(), secrets.randbits(UUID7_RANDOM_BITS))
    document: dict[str, str | None] = {"realm": realm, "device": device, "command": command_id}
    if queue:
        with open_registry(load_settings(config)) as registry:
            expires_at = registry.queue_command(realm, device, command_id, content, lifetime)
        document |= {"state": "queued", "expires_at": rfc3339(expires_at)}
        done = f"Queued for {device}: it is sent when the device connects, until {rfc3339(expires_at)}."
    else:
        _send(config, realm, device, command_id, content, timeout)
        document |= {"state": "delivered"}
        done = f"Delivered to {device}."
    if as_json:
        print_json(document)
    else:
        print(done)


@app.command(rich_help_panel=PANEL)
def list_commands(
    *,
    realm: Annotated[
        str | None, typer.Option(metavar="REALM", help="Only for devices of this realm.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Only for devices of this name.", show_default=False)
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, max=100_000, help="How many at most, the oldest first.")
    ] = 1000,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List commands that wait in the registry until their device connects."""
    with open_registry(load_settings(config)) as registry:
        waiting = registry.waiting_commands(realm=realm, device=device, limit=limit)
    if as_json:
        print_json([_document(command) for command in waiting])
    else:
        columns = ("command", "realm", "device", "bytes", "queued", "expires")
        print_table(columns, [_row(command) for command in waiting])


@app.command(rich_help_panel=PANEL)
def cancel_command(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="Its id, as `list-commands` shows it.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a command wait no longer. One that is under way to its device just now may still arrive."""
    with open_registry(load_settings(config)) as registry:
        registry.cancel_command(command)
    if as_json:
        print_json({"command": command, "state": "cancelled"})
    else:
        print(f"Cancelled {command}.")


def _document(command: "WaitingCommand") -> dict[str, object]:
    return {
        "command": command.command_id,
        "realm": command.realm,
        "device": command.device,
        "created_at": rfc3339(command.created_at),
        "expires_at": rfc3339(command.expires_at),
        "payload_base64": base64.b64encode(command.payload).decode(),
    }


def _row(command: "WaitingCommand") -> tuple[str | None, ...]:
    return (
        command.command_id,
        command.realm,
        command.device,
        str(len(command.payload)),
        rfc3339(command.created_at),
        rfc3339(command.expires_at),
    )


def _send(  # noqa: PLR0917 -- what a command has
    config: Path | None, realm: str, device: str, command_id: str, payload: bytes, timeout_s: float
) -> None:
    from gateway.server.control.messages import CommandOutcome, SendCommand

    answer = ask(config, SendCommand(realm, device, command_id, payload, timeout_s), timeout_s + ANSWER_S)
    assert isinstance(answer, CommandOutcome)
    if answer.state == "delivered":
        return
    if answer.state == "not_connected":
        raise ControlError(
            f"device {device} of realm {realm} is not connected: `--queue` keeps the command until it is"
        )
    raise ControlError(f"the command was not delivered to {device}: {answer.detail}")


def _read_payload(payload: str | None, file: Path | None) -> bytes:
    if payload is not None:
        return os.fsencode(payload)
    if file is not None:
        with file.open("rb") as source:
            content = source.read(PAYLOAD_BYTES_MAX + 1)
    else:
        content = sys.stdin.buffer.read(PAYLOAD_BYTES_MAX + 1)
    if len(content) > PAYLOAD_BYTES_MAX:
        raise ControlError(f"the payload has more than {PAYLOAD_BYTES_MAX} bytes")
    return content


def _parse_ttl(text: str) -> dt.timedelta:
    """A number and a unit; more than nothing and at most a year."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    ttl = dt.timedelta(seconds=int(match[1]) * UNITS_S[match[2]]) if match else dt.timedelta()
    if not dt.timedelta() < ttl <= TTL_MAX:
        raise typer.BadParameter(
            f"{text!r} is not a time from 1s to 366d: write a number and s, m, h or d", param_hint="--ttl"
        )
    return ttl
