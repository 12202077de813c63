"""list-sessions and kick-device: the live side of a running gateway, over its control socket."""

import asyncio
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from gateway.cli.options import ConfigOption, JsonOption, RealmOption, load_settings
from gateway.cli.output import WIDTH_MAX, print_json, print_json_array, print_table, rfc3339
from gateway.errors import ControlError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.server.control.messages import Message, SessionInfo

__all__ = ["app", "ask"]

app = typer.Typer()

PANEL = "Live sessions"
ASK_TIMEOUT_S = 10.0
LIST_TIMEOUT_S = 30.0
"""A hundred thousand sessions take seconds."""
KILO, TEN, UNITS = 1_000, 10, "kMGT"


@app.command(rich_help_panel=PANEL)
def list_sessions(
    *,
    realm: Annotated[
        str | None, typer.Option(metavar="REALM", help="Only of this realm.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Only of this device.", show_default=False)
    ] = None,
    route: Annotated[
        str | None, typer.Option(metavar="ROUTE", help="Only on this route.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List who is connected: since when, from where, on which route, with which suite, and how much went each way."""
    from gateway.server.control.messages import ListSessions, Sessions

    answer = ask(config, ListSessions(realm, device, route), LIST_TIMEOUT_S)
    assert isinstance(answer, Sessions)
    sessions = sorted(answer.sessions, key=lambda session: (session.realm, session.device, session.since))
    now = time.time()
    if as_json:
        print_json_array(_document(session, now) for session in sessions)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_MAX
    columns = [column for column in COLUMNS if column.width <= width]
    print_table(
        [column.name for column in columns],
        ([column.cell(session, now) for column in columns] for session in sessions),
    )


@app.command(rich_help_panel=PANEL)
def kick_device(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")],
    realm: RealmOption = "default",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the sessions of a device. It may connect again: `disable-device` keeps it out."""
    from gateway.server.control.messages import Done, Kick

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
    from gateway.server.control.channel import CONTROL_SOCKET, connect_unix

    path = load_settings(config).node.data_dir / CONTROL_SOCKET

    async def converse() -> "Message":
        async with connect_unix(path) as channel:
            return await channel.call(message, timeout_s)

    return asyncio.run(converse())


class Column(NamedTuple):
    """A column of the table; one that is not needed is shown where the terminal has `width` characters."""

    name: str
    width: int
    cell: "Callable[[SessionInfo, float], str]"


COLUMNS = (
    Column("realm", 0, lambda session, _: session.realm),
    Column("device", 0, lambda session, _: session.device),
    Column("address", 0, lambda session, _: session.address),
    Column("route", 0, lambda session, _: session.route),
    Column("age", 0, lambda session, now: age(now - session.since)),
    Column("in", 0, lambda session, _: size(session.received_bytes)),
    Column("out", 0, lambda session, _: size(session.sent_bytes)),
    Column("messages", 100, lambda session, _: "-" if session.messages is None else str(session.messages)),
    Column("TLS", 120, lambda session, _: session.tls_version.removeprefix("TLSv")),
    Column("suite", 120, lambda session, _: session.cipher),
    Column("worker", 160, lambda session, _: session.worker.removeprefix("worker-")),
    Column("connection", 160, lambda session, _: session.connection),
)

AGES = ((86_400, "d"), (3_600, "h"), (60, "m"))


def age(seconds: float) -> str:
    """`59s`, `1h02m`, `3d04h`."""
    left = max(0, int(seconds))
    for (unit_s, unit), (next_s, following) in zip(AGES, (*AGES[1:], (1, "s")), strict=True):
        if left >= unit_s:
            return f"{left // unit_s}{unit}{left % unit_s // next_s:02}{following}"
    return f"{left}s"


def size(count: int) -> str:
    """Bytes in four characters or little more: `999B`, `1.2k`, `34M`."""
    if count < KILO:
        return f"{count}B"
    power = min(len(UNITS), int(math.log(count, KILO) + 1e-9))
    amount = count / KILO**power
    return f"{amount:.{int(amount < TEN)}f}{UNITS[power - 1]}"


def _document(session: "SessionInfo", now: float) -> dict[str, Any]:
    return {
        "session": session.session,
        "connection": session.connection,
        "realm": session.realm,
        "device": session.device,
        "identity": session.identity,
        "address": session.address,
        "listener": session.listener,
        "route": session.route,
        "tls_version": session.tls_version,
        "cipher": session.cipher,
        "since": rfc3339(session.since),
        "age_s": round(max(0.0, now - session.since), 3),
        "received_bytes": session.received_bytes,
        "sent_bytes": session.sent_bytes,
        "messages": session.messages,
        "worker": session.worker,
    }
