"""list-, retry- and discard-dead-letters: messages that a spooled route could not deliver, in a running gateway."""

import base64
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.live import ask
from gateway.cli.options import ConfigOption, JsonOption, load_settings
from gateway.cli.output import print_json, print_table, remark, rfc3339
from gateway.errors import ConfigurationError, ControlError

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.server.control.messages import DeadLetterInfo, DiscardDeadLetters, RetryDeadLetters

__all__ = ["app"]

app = typer.Typer()

PANEL = "Dead letters"
TIMEOUT_S = 60.0
"""Writing back a gigabyte takes a while."""

RouteOption = Annotated[
    str | None,
    typer.Option("--route", metavar="ROUTE", help="Only of this route.", show_default=False),
]
IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ID]...", help="Ids as `list-dead-letters` shows them, or --all.", show_default=False
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.", show_default=False)]


@app.command(rich_help_panel=PANEL)
def list_dead_letters(
    route: RouteOption = None,
    limit: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, max=100_000, help="How many at most, the oldest first.")
    ] = 1000,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List messages that their backend refused for good, or that waited longer than `spool.age_max_s`."""
    from gateway.server.control.messages import DeadLetters, ListDeadLetters

    _check_route(config, route)
    answer = ask(config, ListDeadLetters(limit, route), TIMEOUT_S)
    assert isinstance(answer, DeadLetters)
    if as_json:
        print_json([_document(letter) for letter in answer.letters])
    else:
        columns = ("id", "route", "realm", "device", "received", "bytes", "reason")
        print_table(columns, [_row(letter) for letter in answer.letters])
    if answer.total > len(answer.letters):
        remark(f"{answer.total - len(answer.letters):,} more are not shown: see --limit")


@app.command(rich_help_panel=PANEL)
def retry_dead_letters(
    ids: IdsArgument = None,
    *,
    every: AllOption = False,
    route: RouteOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deliver dead letters again, behind what waits already. Those that are refused again come back."""
    from gateway.server.control.messages import RetryDeadLetters

    _check_route(config, route)
    _act(config, RetryDeadLetters(_chosen(ids, every), route), "retried", "Put back", as_json)


@app.command(rich_help_panel=PANEL)
def discard_dead_letters(
    ids: IdsArgument = None,
    *,
    every: AllOption = False,
    route: RouteOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete dead letters for good."""
    from gateway.server.control.messages import DiscardDeadLetters

    _check_route(config, route)
    _act(config, DiscardDeadLetters(_chosen(ids, every), route), "discarded", "Deleted", as_json)


def _chosen(ids: list[str] | None, every: bool) -> list[str] | None:
    if bool(ids) == every:
        raise typer.BadParameter("name ids, or --all of them", param_hint="ID")
    return ids or None


def _check_route(config: "Path | None", route: str | None) -> None:
    """A name that is mistyped is not an empty list."""
    if route is None:
        return
    spooled = [each.name for each in load_settings(config).routes if each.delivery == "spooled"]
    if route not in spooled:
        raise ConfigurationError(
            f"there is no spooled route {route} (there is: {', '.join(spooled) or 'none'})"
        )


def _act(
    config: "Path | None",
    message: "RetryDeadLetters | DiscardDeadLetters",
    key: str,
    done: str,
    as_json: bool,
) -> None:
    from gateway.server.control.messages import Done

    answer = ask(config, message, TIMEOUT_S)
    assert isinstance(answer, Done)
    if message.ids is not None and answer.count < len(set(message.ids)):
        missing = len(set(message.ids)) - answer.count
        raise ControlError(
            f"{missing} of these ids {'is' if missing == 1 else 'are'} not there (the others were {key}): "
            "see `gatewayctl list-dead-letters`"
        )
    if as_json:
        print_json({key: answer.count})
    else:
        print(f"{done} {answer.count:,} dead letter{'' if answer.count == 1 else 's'}.")


def _row(letter: "DeadLetterInfo") -> tuple[str | None, ...]:
    return (
        letter.id,
        letter.route,
        letter.realm,
        letter.device,
        rfc3339(letter.received_at),
        f"{len(letter.payload):,}",
        letter.reason,
    )


def _document(letter: "DeadLetterInfo") -> dict[str, Any]:
    return {
        "id": letter.id,
        "route": letter.route,
        "realm": letter.realm,
        "device": letter.device,
        "identity": letter.identity,
        "event": letter.event,
        "received": rfc3339(letter.received_at),
        "refused": rfc3339(letter.at),
        "reason": letter.reason,
        "payload_base64": base64.b64encode(letter.payload).decode("ascii"),
    }
