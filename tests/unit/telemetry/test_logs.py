import datetime as dt
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog

import gateway
from gateway.telemetry.logs import LogSettings, setup

Level = Literal["debug", "info", "warning", "error"]


class Stream(io.TextIOWrapper):
    """A stderr that is, or is not, a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def text(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.root.handlers.clear()
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def start(
    monkeypatch: pytest.MonkeyPatch,
    *,
    format: Literal["console", "json"] = "console",  # noqa: A002 -- the name of the setting
    level: Level = "info",
    terminal: bool = False,
) -> tuple[Any, Stream]:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    setup(LogSettings(level=level, format=format), "worker 1")
    return structlog.get_logger(), stream


def test_json_is_one_object_per_line_with_a_utc_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = start(monkeypatch, format="json")
    log.info("listening", address="127.0.0.1:8883", count=2, raw=b"\x00\xff", error=ValueError("no"))

    line = json.loads(stream.text())
    assert list(line)[:4] == ["timestamp", "level", "process", "event"]
    assert line | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "process": "worker 1",
        "event": "listening",
        "address": "127.0.0.1:8883",
        "count": 2,
        "raw": "AP8=",
        "error": "ValueError('no')",
    }
    assert line["timestamp"].endswith("Z")
    assert dt.datetime.fromisoformat(line["timestamp"]).utcoffset() == dt.timedelta()


def test_console_output_off_a_terminal_is_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = start(monkeypatch)
    log.warning("handshake_refused", outcome="no_shared_cipher", detail="two words")

    _, _, rest = stream.text().partition(" ")
    assert rest == (
        "[warning] handshake_refused outcome=no_shared_cipher detail='two words' process='worker 1'\n"
    )


def test_console_output_on_a_terminal_is_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = start(monkeypatch, terminal=True)
    log.info("listening")
    assert "\x1b[" in stream.text()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_peer_sent_cannot_begin_a_line_or_speak_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    log, stream = start(monkeypatch, terminal=terminal)
    log.info("refused", detail="one\ntwo\x1b[2J\x9b31m\u202e")

    assert stream.text().count("\n") == 1
    assert "\x1b[2J" not in stream.text()
    assert "\x9b" not in stream.text()
    assert "\u202e" not in stream.text()


def test_below_the_level_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = start(monkeypatch, level="warning")
    log.info("quiet")
    log.debug("quiet")
    assert stream.text() == ""


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_traceback_shows_no_local_variables(
    monkeypatch: pytest.MonkeyPatch,
    format: Literal["console", "json"],  # noqa: A002 -- the name of the setting
) -> None:
    log, stream = start(monkeypatch, format=format)

    def fail(key: str) -> None:
        raise RuntimeError(f"broken after {len(key)} characters")

    try:
        fail("".join(["00", "11"] * 8))  # the digits together stand in no line of source
    except RuntimeError:
        log.exception("worker_failed")

    assert "RuntimeError: broken after 32 characters" in stream.text()
    assert "0011" not in stream.text()


def test_the_standard_library_and_warnings_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stream = start(monkeypatch, format="json")
    logging.getLogger("some.library").warning("trouble with %s", "it")
    logging.getLogger("some.library").info("inner life")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way", DeprecationWarning, stacklevel=1)

    first, second = (json.loads(line) for line in stream.text().splitlines())
    assert (first["logger"], first["level"], first["event"]) == ("some.library", "warning", "trouble with it")
    assert second["logger"] == "py.warnings"
    assert "DeprecationWarning: old way" in second["event"]


def test_a_change_reaches_the_module_that_is_the_process() -> None:
    """Worker and follower run as `__main__`, and log from there."""
    code = (
        "import structlog\n"
        "from gateway.telemetry.logs import LogSettings, change, setup\n"
        "log = structlog.get_logger()\n"
        "setup(LogSettings())\n"
        "log.info('before')\n"
        "change(LogSettings(format='json', level='warning'))\n"
        "log.info('hidden')\n"
        "log.warning('after')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(gateway.__file__).parents[1],
    )
    before, after = done.stderr.splitlines()
    assert "before" in before
    assert json.loads(after)["event"] == "after"
