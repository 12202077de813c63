"""Traces on their way through the supervisor: every worker is asked, also one that starts later, and what they tell goes to
the operator who asked.

A trace ends when its time is over, or when its operator has gone. An operator who does not read loses events, and is told how
many; nothing waits for him.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from msgspec import structs

from gateway.errors import ControlError
from gateway.server.control.channel import Channel
from gateway.server.control.trace_messages import (
    KeyLogLine,
    StartTrace,
    StopTrace,
    TraceEvents,
    TraceOver,
    TraceStarted,
)
from gateway.server.supervision.children import Child

__all__ = ["KEY_LOG_S_MAX", "TRACE_S_MAX", "TraceRelay"]

log = structlog.get_logger()

TRACERS_MAX: Final = 8
"""At a time, on one node."""
TRACE_S_MAX: Final = 24 * 3600.0
KEY_LOG_S_MAX: Final = 3600.0
"""A device's sessions can be read by who has the file: an hour is enough to see it connect a few times."""
WAITING_BYTES_MAX: Final = 1024 * 1024
"""Events that an operator has not read yet."""


class _Trace:
    def __init__(self, start: StartTrace, operator: Channel, timer: asyncio.TimerHandle) -> None:
        self.start = start
        self.operator = operator
        self.timer = timer
        self.left_out = 0


class TraceRelay:
    """All traces of one node. `allow_key_log` as `[admin]` has it."""

    def __init__(self, workers: Callable[[], Sequence[Child]], *, allow_key_log: bool) -> None:
        self._workers = workers
        self._allow_key_log = allow_key_log
        self._numbers = itertools.count(1)
        self._traces: dict[int, _Trace] = {}

    def begin(self, asked: StartTrace, operator: Channel) -> TraceStarted:
        """Begin a trace for an operator. Raises ControlError."""
        if len(self._traces) >= TRACERS_MAX:
            raise ControlError(f"{TRACERS_MAX} traces run already: end one of them")
        if asked.wants_keys and not self._allow_key_log:
            raise ControlError(
                "this gateway writes no key log: set admin.allow_key_log = true, and reload it"
            )
        now = time.time()
        most_s = KEY_LOG_S_MAX if asked.wants_keys else TRACE_S_MAX
        start = structs.replace(
            asked, number=next(self._numbers), until=min(max(asked.until, now), now + most_s)
        )
        timer = asyncio.get_running_loop().call_later(start.until - now, self._over, start.number)
        self._traces[start.number] = _Trace(start, operator, timer)
        for worker in self._workers():
            worker.notify(start)
        write = log.warning if start.wants_keys else log.info
        write(
            "trace_started",
            trace=start.number,
            target=start.target,
            realm=start.realm,
            for_s=round(start.until - now),
            key_log=start.wants_keys,
        )
        return TraceStarted(start.number, start.until)

    def change(self, *, allow_key_log: bool) -> None:
        """The configuration has changed; traces that run go on."""
        self._allow_key_log = allow_key_log

    def worker_started(self, worker: Child) -> None:
        """A worker begins empty: tell it what is traced."""
        for trace in self._traces.values():
            worker.notify(trace.start)

    def told(self, message: TraceEvents | KeyLogLine) -> None:
        """Pass on what a worker tells."""
        trace = self._traces.get(message.number)
        if trace is None:  # over in the meantime
            return
        if trace.operator.waiting_bytes > WAITING_BYTES_MAX:
            trace.left_out += len(message.events) if isinstance(message, TraceEvents) else 1
            return
        if isinstance(message, TraceEvents) and trace.left_out:
            message = structs.replace(message, left_out=message.left_out + trace.left_out)
            trace.left_out = 0
        trace.operator.notify(message)

    def gone(self, operator: Channel) -> None:
        """An operator hung up."""
        for number in [number for number, trace in self._traces.items() if trace.operator is operator]:
            self._end(number)

    def _over(self, number: int) -> None:
        trace = self._end(number)
        trace.operator.notify(TraceOver(number))

    def _end(self, number: int) -> _Trace:
        trace = self._traces.pop(number)
        trace.timer.cancel()
        for worker in self._workers():
            worker.notify(StopTrace(number))
        log.info("trace_ended", trace=number, target=trace.start.target)
        return trace
