"""trace-device: the handshakes of one device as they happen, what is wrong with them, and what to do."""

import asyncio
import contextlib
import datetime as dt
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gateway.cli.options import ConfigOption, JsonOption, load_settings, open_registry, parse_duration
from gateway.cli.output import remark, rfc3339
from gateway.errors import ConfigurationError, ControlError

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.server.control.messages import Message
    from gateway.server.control.trace_messages import StartTrace, TraceEvent

__all__ = ["app"]

app = typer.Typer()

KEY_LOG_FOR = "10m"
ASK_TIMEOUT_S = 10.0


@app.command(rich_help_panel="Live sessions")
def trace_device(
    target: Annotated[
        str,
        typer.Argument(
            metavar="IDENTITY|ADDRESS",
            help="An identity, the name of a device (all its identities), or the address that it connects from.",
        ),
    ],
    *,
    realm: Annotated[
        str | None, typer.Option(metavar="REALM", help="Only in this realm.", show_default=False)
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="End after so many handshakes.", show_default=False),
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TIME",
            help=f"End after this time, such as 10m. Default: 24h, with --key-log {KEY_LOG_FOR}.",
            show_default=False,
        ),
    ] = None,
    show_bytes: Annotated[
        bool, typer.Option("--bytes", help="Show the bytes of each message.", show_default=False)
    ] = False,
    key_log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the session keys of its connections to a new file, for Wireshark. Audited; needs "
            "admin.allow_key_log, and an hour at most.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the handshakes of one device as they happen, message by message, how each ended, and what to do about it.

    Ctrl-C ends it. It costs other devices nothing, and shows no key.
    """
    settings = load_settings(config)

    from gateway.server.control.trace_messages import StartTrace
    from gateway.server.supervision.trace_relay import KEY_LOG_S_MAX, TRACE_S_MAX

    most_s = TRACE_S_MAX if key_log is None else KEY_LOG_S_MAX
    text = duration or (f"{most_s:.0f}s" if key_log is None else KEY_LOG_FOR)
    duration_s = parse_duration(text, "--for").total_seconds()
    if not 0 < duration_s <= most_s:
        raise typer.BadParameter(f"give 1s to {most_s / 3600:.0f}h", param_hint="--for")
    start = StartTrace(target, time.time() + duration_s, realm, key_log is not None)
    printer = _JsonPrinter() if as_json else _Printer(show_bytes=show_bytes)
    with _key_log_file(key_log, start, settings) as write_secret:
        asyncio.run(_follow(settings.node.data_dir, start, printer, write_secret, count))


@contextlib.contextmanager
def _key_log_file(
    path: Path | None, start: "StartTrace", settings: "GatewaySettings"
) -> Iterator[Callable[[str], None]]:
    """The new file, and an entry in the audit before anything is written to it."""
    if path is None:
        yield lambda _line: None
        return
    if not settings.admin.allow_key_log:
        raise ConfigurationError(
            "a key log is not allowed: set admin.allow_key_log = true, and restart the gateway"
        )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(f"{path} is there already: name a new file, or remove it") from None
    with os.fdopen(descriptor, "w", encoding="ascii", buffering=1) as file:
        try:
            with open_registry(settings) as registry:
                until = dt.datetime.fromtimestamp(start.until, dt.UTC)
                registry.audit_key_log(start.target, start.realm, until)
            yield lambda line: print(line, file=file)
        finally:
            if not file.tell():
                path.unlink(missing_ok=True)


async def _follow(
    data_dir: Path,
    start: "StartTrace",
    printer: "_Printer",
    write_secret: Callable[[str], None],
    count: int | None,
) -> None:
    """Print what comes until the time is over, enough was seen, or the user has."""
    from gateway.server.control.channel import CONTROL_SOCKET, connect_unix
    from gateway.server.control.trace_messages import TraceStarted

    inbox: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive(message: "Message") -> None:
        inbox.put_nowait(message)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, inbox.put_nowait, None)
    async with connect_unix(data_dir / CONTROL_SOCKET, receive) as channel:
        started = await channel.call(start, ASK_TIMEOUT_S)
        assert isinstance(started, TraceStarted)
        remark(f"Tracing {start.target} until {rfc3339(int(started.until))}. Ctrl-C ends it.")
        lost = loop.create_task(channel.ended.wait())
        lost.add_done_callback(lambda _: inbox.put_nowait(None))
        try:
            with printer:
                await _print_from(inbox, printer, write_secret, count)
            if lost.done():
                raise ControlError("the gateway closed the control channel: it stopped, or was started again")
        finally:
            lost.cancel()


async def _print_from(
    inbox: "asyncio.Queue[Message | None]",
    printer: "_Printer",
    write_secret: Callable[[str], None],
    count: int | None,
) -> None:
    from gateway.server.control.trace_messages import KeyLogLine, TraceEvents, TraceOutcome

    seen = 0
    while (message := await inbox.get()) is not None:
        if isinstance(message, KeyLogLine):
            write_secret(message.line)
        elif isinstance(message, TraceEvents):
            for event in message.events:
                printer.show(event)
                seen += isinstance(event, TraceOutcome)
            if message.left_out:
                printer.left_out(message.left_out)
            if count is not None and seen >= count:
                return
        else:  # TraceOver
            return


class _Printer:
    """Events as lines for people. What a device sent is printed without its control characters."""

    def __init__(self, *, show_bytes: bool = False) -> None:
        self._show_bytes = show_bytes

    def __enter__(self) -> None:
        """Begin the document."""

    def __exit__(self, *_exc: object) -> None:
        """End the document."""

    def show(self, event: "TraceEvent") -> None:
        """Print an event at once."""
        when = dt.datetime.fromtimestamp(event.at, dt.UTC).strftime("%H:%M:%S.%f")[:-3]
        first, *more = _lines(event, show_bytes=self._show_bytes)
        print(_printable(f"{when} {event.connection}  {first}"))
        for line in more:
            print(_printable(f"    {line}"))
        sys.stdout.flush()

    def left_out(self, count: int) -> None:
        """Say that not all is shown."""
        remark(f"{count} events or connections were left out: there are too many to show.")


class _JsonPrinter(_Printer):
    """Events as the elements of one array, each written as it comes."""

    _separator = "["

    def show(self, event: "TraceEvent") -> None:
        self._write(_document(event))

    def left_out(self, count: int) -> None:
        self._write({"event": "left_out", "count": count})

    def __exit__(self, *_exc: object) -> None:
        print("[]" if self._separator == "[" else "\n]", flush=True)

    def _write(self, document: dict[str, Any]) -> None:
        print(f"{self._separator}\n  {json.dumps(document)}", end="", flush=True)
        self._separator = ","


LIST_SHOWN: Final = 40
"""Suites or groups on one line; a browser's hello has some twenty."""


def _lines(event: "TraceEvent", *, show_bytes: bool) -> list[str]:
    from gateway.server.control.trace_messages import (
        TraceConnected,
        TraceEnded,
        TraceHello,
        TraceIdentity,
        TraceMessage,
        TraceOutcome,
    )
    from gateway.wire.handshake_names import describe_message

    match event:
        case TraceConnected():
            return [f"connected from {event.address} to listener {event.listener}"]
        case TraceHello():
            return _hello_lines(event)
        case TraceMessage():
            whole = describe_message(
                sent=event.sent, version=event.version, content_type=event.content_type, data=event.data
            )
            first, *rows = whole.splitlines()
            return [first, *rows] if show_bytes else [first]
        case TraceIdentity():
            known = f"device {event.device}" if event.device is not None else "not in the registry"
            return [f"identity {event.identity} ({known})"]
        case TraceOutcome():
            return _outcome_lines(event)
        case TraceEnded():
            return [f"ended: {event.reason}; {event.received_bytes} B received, {event.sent_bytes} B sent"]


def _hello_lines(event: Any) -> list[str]:
    realm = event.realm if event.realm is not None else "none (it does not exist)"
    name = f"server name {event.server_name}" if event.server_name else "no server name"
    offers = [
        ("versions", event.versions),
        ("suites", event.suites),
        ("groups", event.groups),
        ("psk modes", event.psk_modes),
        ("ALPN", event.alpn),
        ("identities", event.identities),
    ]
    lines = [f"hello: {name}, so realm {realm}"]
    lines += [f"offered {what}: {', '.join(values[:LIST_SHOWN])}" for what, values in offers if values]
    lines.append(f"allowed suites: {', '.join(event.allowed_suites)}")
    lines.append(f"hint in TLS 1.2: {event.hint or 'none is sent'}")
    return lines


def _outcome_lines(event: Any) -> list[str]:
    chosen = ", ".join(filter(None, (event.tls_version, event.cipher)))
    line = f"outcome {event.outcome} after {event.handshake_s:.3f} s"
    details = [
        event.reason,
        chosen,
        event.route and f"route {event.route}",
        event.session and f"session {event.session}",
    ]
    if any(details):
        line += ": " + ", ".join(filter(None, details))
    return [line, *([f"fix: {event.fix}"] if event.fix else [])]


def _document(event: "TraceEvent") -> dict[str, Any]:
    from msgspec import to_builtins

    from gateway.server.control.trace_messages import TraceMessage
    from gateway.wire.handshake_names import message_name, version_name

    document: dict[str, Any] = to_builtins(event, builtin_types=(bytes,))
    document["time"] = rfc3339(document.pop("at"))
    if isinstance(event, TraceMessage):
        del document["content_type"]
        document["version"] = version_name(event.version)
        document["message"] = message_name(event.content_type, event.data)
        document["data"] = event.data.hex()
    return document


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
