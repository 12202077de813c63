"""gatewayctl: the command line. One file per family of commands, each with a typer app of its own.

Exit status: 0 done, 1 refused or failed (one line `error: ...` on stderr), 2 wrong usage, 130 interrupted.
Heavy imports stand inside the commands, so that `--help` and wrong usage answer at once.
"""

import contextlib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from gateway import __version__
from gateway.errors import GatewayError
from gateway.server.processes.hardening import harden

__all__ = ["main", "root_app"]

FAMILIES = (
    "setup",
    "config",
    "doctor",
    "run",
    "realms",
    "devices",
    "transfer",
    "keys",
    "audit",
    "live",
    "trace",
    "drain",
    "dead_letters",
    "commands",
    "connect",
    "tunnel",
    "simulate",
)
"""The modules of this package that bring commands, in the order of `--help`."""

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    if arguments is None:  # this process is ours, and commands see keys too
        harden()
    try:
        status = _run(arguments)
    except GatewayError as exc:
        status = _fail(str(exc))
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        _close_stdout()
        status = 1
    except OSError as exc:
        status = _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror or exc))
    except Exception as exc:  # noqa: BLE001 -- the last line of defence: no traceback reaches a user unasked
        status = _fail_inside(exc)
    if arguments is None:
        gc.freeze()  # else all is looked through once more at the end, a seventh of what a short command takes
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> int | str | None:
    command = get_command(root_app())
    try:
        command.main(None if arguments is None else list(arguments), prog_name="gatewayctl")
    except SystemExit as exc:
        if sys.stdout is not None:
            sys.stdout.flush()  # here and not at exit, where a broken pipe could only be reported
        return exc.code
    raise AssertionError("the command always exits")


def root_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        help="Run and steer a TLS-PSK gateway.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for family in FAMILIES:
        app.add_typer(importlib.import_module(f"gateway.cli.{family}").app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gatewayctl {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run and steer a TLS-PSK gateway."""


def _fail(text: str) -> int:
    line = " ".join(text.splitlines())
    print(f"error: {line}", file=sys.stderr)
    return 1


def _fail_inside(exc: Exception) -> int:
    if os.environ.get("PSKGW_TRACEBACK"):
        traceback.print_exception(exc)
    return _fail(
        f"internal error ({type(exc).__name__}): set PSKGW_TRACEBACK=1, try again and report what it prints"
    )


def _close_stdout() -> None:
    with contextlib.suppress(OSError):  # what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
