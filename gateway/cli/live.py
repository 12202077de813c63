"""list-sessions and kick-device: the live side of a running gateway, over its control socket."""

import asyncio
import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.options import ConfigOption, JsonOption, RealmOption, load_settings
from gateway.cli.output import print_json, print_table, rfc3339
from gateway.errors import ControlError

if TYPE_CHECKING:
    from gateway.server.control import Message, SessionInfo

__all__ = ["app", "ask"]

app = typer.Typer()

PANEL = "Live sessions"
ASK_TIMEOUT_S = 10.0


@app.command(rich_help_panel=PANEL)
def list_sessions(
    realm: Annotated[
        str | None, typer.Option(metavar="REALM", help="Only of this realm.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Only of this device.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List who is connected."""
    from gateway.server.control import ListSessions, Sessions

    answer = ask(config, ListSessions(realm, device))
    assert isinstance(answer, Sessions)
    sessions = sorted(answer.sessions, key=lambda session: (session.realm, session.device, session.since))
    if as_json:
        print_json([_document(session) for session in sessions])
        return
    columns = ("realm", "device", "address", "route", "TLS", "cipher", "since", "received", "sent")
    print_table(columns, [_row(session) for session in sessions])


@app.command(rich_help_panel=PANEL)
def kick_device(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")],
    realm: RealmOption = "default",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the sessions of a device. It may connect again: `disable-device` keeps it out."""
    from gateway.server.control import Done, Kick

    answer = ask(config, Kick(realm, device))
    assert isinstance(answer, Done)
    if not answer.count:
        raise ControlError(
            f"device {device} of realm {realm} is not connected: see `gatewayctl list-sessions`"
        )
    if as_json:
        print_json({"realm": realm, "device": device, "sessions": answer.count})
    else:
        print(f"Ended {answer.count} session{'s' if answer.count > 1 else ''} of {device}.")


def ask(config: Path | None, message: "Message", timeout_s: float = ASK_TIMEOUT_S) -> "Message":
    """Ask the running gateway. Raises ControlError when there is none, or it refuses or does not answer in time."""
    from gateway.server.control import connect_unix
    from gateway.server.supervisor import CONTROL_SOCKET

    path = load_settings(config).node.data_dir / CONTROL_SOCKET

    async def converse() -> "Message":
        async with connect_unix(path) as channel:
            return await channel.call(message, timeout_s)

    return asyncio.run(converse())


def _row(session: "SessionInfo") -> tuple[str | None, ...]:
    since = dt.datetime.fromtimestamp(int(session.since), dt.UTC)
    return (
        session.realm,
        session.device,
        session.address,
        session.route,
        session.tls_version,
        session.cipher,
        rfc3339(since),
        f"{session.received_bytes:,} B",
        f"{session.sent_bytes:,} B",
    )


def _document(session: "SessionInfo") -> dict[str, Any]:
    return {
        "session": session.session,
        "realm": session.realm,
        "device": session.device,
        "identity": session.identity,
        "address": session.address,
        "listener": session.listener,
        "route": session.route,
        "tls_version": session.tls_version,
        "cipher": session.cipher,
        "since": rfc3339(session.since),
        "received_bytes": session.received_bytes,
        "sent_bytes": session.sent_bytes,
    }
