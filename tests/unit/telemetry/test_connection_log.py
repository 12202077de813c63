import datetime as dt
import io
import json
from typing import Any, Literal

import pytest
import structlog

from gateway.telemetry.connection_log import (
    LINES_BURST,
    LINES_PER_S,
    SUMMARY_EVERY_S,
    ConnectionEnded,
    ConnectionLog,
)
from gateway.telemetry.logs import LogSettings

FAILED = ConnectionEnded(
    connection="c0ffee00-1", listener="tls", address="192.0.2.1", outcome="wrong_key", reason="bad", handshake_s=0.25
)  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["console", "json"] = "json",  # noqa: A002 -- the name of the setting
) -> tuple[ConnectionLog, io.BytesIO, Clock]:
    stream, clock = io.BytesIO(), Clock()
    return ConnectionLog(LogSettings(level=level, format=format), "worker-3", stream, clock), stream, clock


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_line_has_what_lines_of_structlog_have_and_the_event() -> None:
    log, stream, _ = make()
    log.ended(FAILED)
    (line,) = lines(stream)
    stamp = dt.datetime.fromisoformat(line.pop("timestamp"))
    assert abs(dt.datetime.now(dt.UTC) - stamp) < dt.timedelta(seconds=5)
    assert line == {
        "level": "info", "process": "worker-3", "event": "connection_ended", "connection": "c0ffee00-1", "listener": "tls",
        "address": "192.0.2.1", "outcome": "wrong_key", "reason": "bad", "handshake_s": 0.25,
    }  # fmt: skip


def test_what_a_peer_sent_cannot_begin_a_line() -> None:
    log, stream, _ = make()
    log.ended(ConnectionEnded(
        connection="1", listener="l", address="a", outcome="ok", reason='"}\n{"event":"forged"}', handshake_s=0
    ))  # fmt: skip
    (line,) = lines(stream)
    assert line["event"] == "connection_ended"


@pytest.mark.parametrize(
    ("level", "format", "sessions", "failures"),
    [
        ("debug", "console", True, True), ("debug", "json", True, True), ("info", "json", True, True),
        ("info", "console", False, True), ("warning", "json", False, False), ("error", "console", False, False),
    ],
)  # fmt: skip
def test_who_is_logged_at_which_level(level: Any, format: Any, sessions: bool, failures: bool) -> None:  # noqa: A002
    log, _, _ = make(level, format)
    assert (log.logs_sessions, log.admits("wrong_key")) == (sessions, failures)


def test_a_flood_of_failures_is_bounded_and_counted() -> None:
    log, _, clock = make()
    with structlog.testing.capture_logs() as said:
        assert sum(log.admits("wrong_key") for _ in range(5 * LINES_BURST)) == LINES_BURST
        clock.now += 1
        assert sum(log.admits("timeout") for _ in range(100)) == LINES_PER_S
        log.tick()
        assert not said
        clock.now += SUMMARY_EVERY_S
        log.tick()
        log.tick()
    (line,) = said
    assert line["event"] == "connections_not_logged"
    assert line["outcomes"] == {"wrong_key": 4 * LINES_BURST, "timeout": 100 - LINES_PER_S}
    assert line["count"] == sum(line["outcomes"].values())


class Full(io.BytesIO):
    def write(self, _data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    ConnectionLog(LogSettings(format="json"), "worker-0", Full(), Clock()).ended(FAILED)
