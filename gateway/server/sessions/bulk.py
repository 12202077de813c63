"""The sessions that move much: a few of them keep large buffers, the others make them anew for each piece.

An idle session has to be small, and there is no moment at which a session is known to be idle from now on. So the number of
those with large buffers is bounded, and who comes to be one of them puts out the one that has been it for longest.
"""

from typing import Final

from gateway.tls.session import ServerSession

__all__ = ["BULK_BYTES", "BulkSessions"]

BULK_BYTES: Final = 32 * 1024
"""Who sends or gets so much in one piece moves much: two full records."""
BULK_SESSIONS_MAX: Final = 4
"""Of one worker: 0.8 MiB at most. More streams at full speed than that have no core of their own anyway."""


class BulkSessions:
    """Those of one worker. `sessions` is for asking alone."""

    __slots__ = ("sessions",)

    def __init__(self) -> None:
        self.sessions: dict[ServerSession, None] = {}

    def add(self, session: ServerSession) -> None:
        """A session has just moved much."""
        if session in self.sessions:
            return
        if len(self.sessions) >= BULK_SESSIONS_MAX:
            oldest = next(iter(self.sessions))
            self.discard(oldest)
        self.sessions[session] = None
        session.keep_buffers(keep=True)

    def discard(self, session: ServerSession) -> None:
        """Make a session small again, if it is one of these."""
        if session in self.sessions:
            del self.sessions[session]
            session.keep_buffers(keep=False)
