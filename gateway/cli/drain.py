"""drain: let a running gateway run empty."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from gateway.cli.options import ConfigOption, JsonOption, load_settings, parse_duration
from gateway.cli.output import print_json
from gateway.errors import ControlError

if TYPE_CHECKING:
    from rich.progress import Progress

    from gateway.server.control.messages import Load

__all__ = ["app"]

app = typer.Typer()

_ASK_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.2
_LATE_S: Final = 5.0
"""How much longer than the deadline the last device may take to hang up."""


@app.command(rich_help_panel="Live sessions")
def drain(
    deadline: Annotated[
        str,
        typer.Option(metavar="TIME", help="Time within which all sessions end, such as 90s, 10m or 1h."),
    ] = "60s",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take this node out of service: accept no device, end all sessions spread over the deadline, and wait for that.

    The gateway stays, not ready, and delivers what waits in its spools; SIGTERM or `systemctl stop` ends it. Starting
    it again brings the node back.
    """
    within_s = parse_duration(deadline, "--deadline").total_seconds()
    path = load_settings(config).node.data_dir
    began = time.monotonic()
    first, last = asyncio.run(_drain(path, within_s, shows_progress=not as_json))
    if as_json:
        print_json(
            {
                "sessions": first.sessions,
                "left": last.connections,
                "spooled_messages": last.messages,
                "duration_s": round(time.monotonic() - began, 1),
            }
        )
    if last.connections:
        raise ControlError(
            f"{last.connections} connections are still there after {deadline}: wait, or stop the gateway"
        )
    if not as_json:
        print(f"Drained: {first.sessions:,} sessions ended, {last.messages:,} messages wait in spools.")


async def _drain(data_dir: Path, within_s: float, *, shows_progress: bool) -> "tuple[Load, Load]":
    """The load before and after."""
    from gateway.server.control.channel import CONTROL_SOCKET, connect_unix
    from gateway.server.control.messages import CountLoad, DrainNode

    async with connect_unix(data_dir / CONTROL_SOCKET) as channel:
        first = cast("Load", await channel.call(CountLoad(), _ASK_TIMEOUT_S))
        last = cast("Load", await channel.call(DrainNode(within_s), _ASK_TIMEOUT_S))
        give_up = time.monotonic() + within_s + _LATE_S
        with _progress(shows_progress) as progress:
            task = progress.add_task("Ending sessions", total=max(first.connections, 1))
            while last.connections and time.monotonic() < give_up:
                await asyncio.sleep(_POLL_S)
                last = cast("Load", await channel.call(CountLoad(), _ASK_TIMEOUT_S))
                progress.update(
                    task,
                    completed=max(0, first.connections - last.connections),
                    description=f"{last.connections:,} connections, {last.messages:,} spooled messages",
                )
    return first, last


def _progress(is_shown: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not is_shown,
    )
