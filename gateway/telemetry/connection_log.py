"""One line in the log for the end of every connection, cheap enough to be there as shipped.

The event that every connection has is a Struct, and with `format = "json"` it is encoded and written as it stands, at the level
info: 4.6 us of CPU, where the way through structlog takes 8.3 us and a whole handshake some 85 us (measured, Python 3.11). For
people, on the console, those that went well are `debug`: a terminal that scrolls shows nobody anything.

Whoever has not proved a key can cause lines at the rate of the network, so these are bounded: LINES_BURST of them, then
LINES_PER_S. What is left out is counted, by outcome, in one line every SUMMARY_EVERY_S. Sessions are always logged.
"""

import contextlib
import datetime as dt
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO, Final

import msgspec
import structlog

from gateway.telemetry.logs import LogSettings
from gateway.token_bucket import TokenBucket

__all__ = ["ConnectionEnded", "ConnectionLog"]

log = structlog.get_logger()

LINES_BURST: Final = 1_000
"""Failed handshakes that a worker logs at once: every device of a site after a wrong roll-out, once."""
LINES_PER_S: Final = 20.0
"""And for as long as it lasts: two lines of 500 bytes for each are 1.7 GB a day."""
SUMMARY_EVERY_S: Final = 10.0


class ConnectionEnded(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The event `connection_ended`. What there is not, such as the route of a failed handshake, is left out.

    `outcome` is that of the handshake, `reason` why the connection ended. `handshake_s` and `session_s` are seconds: from
    the accepted connection to the end of the handshake, and from there to the end. Bytes are of payload; `messages` counts
    the frames that came in on a framed route, those that were refused too.
    """

    connection: str
    listener: str
    address: str
    outcome: str
    reason: str
    handshake_s: float
    session_s: float | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None
    messages: int | None = None
    realm: str = ""
    device: str = ""
    identity: str = ""
    session: str = ""
    route: str = ""
    tls_version: str = ""
    cipher: str = ""


class ConnectionLog:
    """The log of one worker's connections. `now` is a monotonic clock, `stream` where JSON goes, unbuffered or flushed."""

    def __init__(
        self, settings: LogSettings, process: str, stream: BinaryIO, now: Callable[[], float]
    ) -> None:
        self._is_json = settings.format == "json"
        self.logs_failures: Final = settings.level in ("debug", "info")
        self.logs_sessions: Final = settings.level == "debug" or (settings.level == "info" and self._is_json)
        self._head = (
            b'","level":"info","process":' + msgspec.json.encode(process) + b',"event":"connection_ended",'
        )
        self._stream = stream
        self._now = now
        self._encoder = msgspec.json.Encoder()
        self._told_at = now()
        self._lines = TokenBucket(LINES_PER_S, LINES_BURST, self._told_at)
        self._left_out: Counter[str] = Counter()

    def admits(self, outcome: str, *, is_wanted: bool = True) -> bool:
        """Whether lines about one more stranger may be written; if not, or none is wanted, it is counted."""
        if not self.logs_failures:
            return False
        if not is_wanted:
            self._left_out[outcome] += 1
            return False
        if self._lines.admits(self._now()):
            return True
        self._left_out[outcome] += 1
        return False

    def ended(self, event: ConnectionEnded) -> None:
        """Write the line of one connection."""
        if not self._is_json:
            write = log.info if event.outcome != "ok" else log.debug
            write("connection_ended", **msgspec.structs.asdict(event))
            return
        stamp = dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")[:-6].encode()
        body = self._encoder.encode(event)
        with contextlib.suppress(OSError):  # a log that cannot be written ends no connection
            self._stream.write(b'{"timestamp":"' + stamp + b"Z" + self._head + body[1:] + b"\n")
            self._stream.flush()

    def tick(self) -> None:
        """Say now and then what was left out."""
        now = self._now()
        if self._left_out and now >= self._told_at + SUMMARY_EVERY_S:
            self._told_at = now
            log.warning("connections_not_logged", count=self._left_out.total(), outcomes=dict(self._left_out))
            self._left_out.clear()
