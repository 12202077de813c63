"""Logging: one structlog set-up for all processes, on stderr, with times in UTC.

Modules take `structlog.get_logger()` once, at their top, and log an event with values as keywords:
`log.info("handshake_refused", outcome="wrong_key", address=...)`. A call below the level costs half a
microsecond: the logger is made for one level and is cached at its first use. So `setup` comes first in a process,
before anything is logged; `change` starts all loggers of ours anew.

Tracebacks are printed without local variables: they may hold keys.
"""

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import IO, Any, AnyStr, BinaryIO, Generic, Literal, TextIO, cast

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, Field
from structlog.typing import EventDict, Processor, WrappedLogger

__all__ = ["LogSettings", "change", "setup"]

Level = Literal["debug", "info", "warning", "error"]

EVENT_WIDTH = 28
"""On a terminal events are padded to this, so that the values below each other stand in line."""


class LogSettings(BaseModel):
    """`[log]`: how much is said, and for whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Level = Field(default="info", description="Least level that is logged.")
    format: Literal["console", "json"] = Field(
        default="console",
        description="`console` for people (in colour on a terminal), `json` for machines: one object per line.",
    )


def setup(settings: LogSettings, process: str = "supervisor") -> None:
    """Send the logs of this process to stderr, its name with each line, the ones of the standard library too.

    Called again it replaces what was set up, except for loggers that were used already: `change` has those too.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[*_common_processors(process), *_renderers(settings, sys.stderr)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_logger_factory(settings, sys.stderr),
        cache_logger_on_first_use=True,
    )
    _route_standard_library(level)


def change(settings: LogSettings, process: str = "supervisor") -> None:
    """Put another level or format in force, for the loggers that were used already too."""
    setup(settings, process)
    for name, module in list(sys.modules.items()):
        # A process's own module has the name __main__.
        is_ours = name.startswith("gateway.") or name == "__main__"
        logger = getattr(module, "log", None) if is_ours else None
        if isinstance(logger, structlog._config.BoundLoggerLazyProxy):  # noqa: SLF001 - it has no public name
            vars(logger).pop("bind", None)  # where it keeps what it assembled at its first use


def _common_processors(process: str) -> list[Processor]:
    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        add_process,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),  # RFC 3339, microseconds, Z
    ]


def _renderers(settings: LogSettings, stream: TextIO) -> list[Processor]:
    if settings.format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_encode_json)]
    on_terminal = stream.isatty()
    return [
        _escape_controls,
        structlog.dev.ConsoleRenderer(
            colors=on_terminal,
            pad_event_to=EVENT_WIDTH if on_terminal else 0,
            pad_level=on_terminal,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _logger_factory(settings: LogSettings, stream: TextIO) -> Any:
    """Whole lines in one write each, so that the lines of several processes on one stream do not mix."""
    if settings.format == "json":
        return structlog.BytesLoggerFactory(cast("BinaryIO", _Lossy(stream.buffer)))
    return structlog.WriteLoggerFactory(cast("TextIO", _Lossy(stream)))


class _Lossy(Generic[AnyStr]):
    """A stream that loses what it cannot write: a full disk under the log, or a reader of it that is gone, stops nobody."""

    def __init__(self, stream: IO[AnyStr]) -> None:
        self._stream: IO[AnyStr] = stream

    def write(self, line: AnyStr) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _encode_json(event: MutableMapping[str, Any], **_kwargs: Any) -> bytes:
    first = {key: event.pop(key) for key in ("timestamp", "level", "process", "event") if key in event}
    return msgspec.json.encode(first | dict(event), enc_hook=repr)


def _escape_controls(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """What a peer sent can neither begin a line of its own nor speak to the terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(
                character if character.isprintable() else _picture(character) for character in value
            )
    return event


def _picture(control: str) -> str:
    code = ord(control)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"  # noqa: PLR2004 -- end of C0


class _ToStructlog(logging.Handler):
    """Hands the records of the standard library to structlog, the name of their logger with them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno, record.getMessage().strip(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:  # noqa: BLE001 -- the contract of logging.Handler: a bad record must not stop its caller
            self.handleError(record)


def _route_standard_library(level: int) -> None:
    # Libraries speak at INFO of their inner life; what concerns an operator is a warning there.
    logging.basicConfig(handlers=[_ToStructlog()], level=max(level, logging.WARNING), force=True)
    logging.captureWarnings(capture=True)
