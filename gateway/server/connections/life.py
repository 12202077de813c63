"""What a session lives by besides its traffic: the end of its credential, the limit of its device, and that it is used.

One per worker. Sessions are registered when their handshake is done and leave when they are gone; `tick` ends those whose
credential is over, and tells what was gathered to the supervisor and the follower. Nothing here writes: a node reports,
and the follower decides what the registry has to know.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from gateway.registry.records import CredentialRecord, RealmRecord
from gateway.server.admission.lookup import NEWCOMER, DeviceLookup, refusal
from gateway.server.control.messages import Message, Newcomers, SessionClosed, SessionOpened, Used
from gateway.server.sessions.index import SessionIndex
from gateway.telemetry.metrics import Outcome

if TYPE_CHECKING:
    from gateway.server.connections.connection import DeviceConnection

__all__ = ["SessionLife"]

REPORT_EVERY_S: Final = 2.0
_USES_MAX: Final = 10_000
"""Uses in one report; more of them wait for the next."""
_ENDS_SPARE: Final = 64


class SessionLife:
    """Args: the worker's index and look-up, its share of the limits, and how it speaks to the supervisor."""

    def __init__(
        self,
        sessions: "SessionIndex[DeviceConnection]",
        lookup: DeviceLookup,
        sessions_per_device: int,
        tell: Callable[[Message], None],
        observe_revocation: Callable[[float], None],
    ) -> None:
        self._sessions = sessions
        self._lookup = lookup
        self._limit = sessions_per_device
        self._tell = tell
        self._observe_revocation = observe_revocation
        self._ends: list[tuple[float, int, DeviceConnection]] = []
        self._numbers = itertools.count()
        self._used: dict[int, float] = {}
        self._newcomers: set[tuple[int, str, str]] = set()
        self._limited: dict[str, int] = {}
        self._report_at = 0.0

    def limit_changed(self, sessions_per_device: int) -> None:
        """Another limit of sessions for each device: it holds for sessions that begin from now on."""
        self._limit = sessions_per_device

    def opened(
        self, session: "DeviceConnection", record: CredentialRecord, realm: RealmRecord, now: float
    ) -> None:
        """A session is live, of a credential with this record. `now` is Unix seconds."""
        self._sessions.add(record.device_id, session)
        if record.not_after is not None:
            self.file_end(session, record.not_after)
        if record.device_id == NEWCOMER:
            self._newcomers.add(
                (record.realm_id, record.device, session.address)
            )  # also when it is soon gone
            self._report_at = 0.0  # at the next tick: it is to be added at once
            return
        if record.used_on < realm.service_day:
            self._used[record.credential_id] = now
        self._report_limited(session, realm, now)

    def closed(self, session: "DeviceConnection") -> None:
        """A session that was opened is gone."""
        self._sessions.remove(session.device_id, session)
        if self._limited and self._limited.pop(session.session_id, None) is not None:
            self._tell(SessionClosed(session.device_id, session.session_id))

    def file_end(self, session: "DeviceConnection", not_after: float | None) -> None:
        """The credential of a session is over at `not_after` (Unix seconds); None: never."""
        if session.not_after == not_after:
            return
        session.not_after = not_after
        if not_after is not None:
            if len(self._ends) > 2 * len(self._sessions) + _ENDS_SPARE:
                self._forget_gone()
            heapq.heappush(self._ends, (not_after, next(self._numbers), session))

    def _forget_gone(self) -> None:
        """Drop what was filed for sessions that ended long before their credential."""
        live = set(self._sessions)
        self._ends = [end for end in self._ends if end[2] in live and end[2].not_after == end[0]]
        heapq.heapify(self._ends)

    def tick(self, now: float) -> None:
        """End what is over at `now` (Unix seconds), and report now and then."""
        while self._ends and self._ends[0][0] <= now:
            not_after, _, session = heapq.heappop(self._ends)
            if session.not_after == not_after and session.is_live:
                session.stop(Outcome.EXPIRED.value)
                self._observe_revocation(max(0.0, now - not_after))
        if now >= self._report_at or self._report_at > now + REPORT_EVERY_S:  # or the clock was set back
            self._report_at = now + REPORT_EVERY_S
            self.report()

    def report(self) -> None:
        """Tell what was gathered."""
        while self._used:
            some = dict(itertools.islice(self._used.items(), _USES_MAX))
            self._tell(Used(some))
            for number in some:
                del self._used[number]
        for session in self._sessions.of_devices([(NEWCOMER, NEWCOMER)]):
            self._newcomers.add((session.realm_id, session.identity, session.address))
        if self._newcomers:
            self._tell(Newcomers(list(self._newcomers)))
            self._newcomers.clear()

    def changed(self, now: float, *, realms: bool) -> None:
        """The registry changed: newcomers may be devices now, and realms have another limit or day of service."""
        by_id = {realm.id: realm for realm in self._lookup.realms.values()}
        for session in self._sessions.of_devices([(NEWCOMER, NEWCOMER)]):
            self._settle(session, by_id.get(session.realm_id), now)
        if realms:
            self._realms_changed(by_id, self._sessions, now)

    def _settle(self, session: "DeviceConnection", realm: RealmRecord | None, now: float) -> None:
        """A newcomer gets the ids of its device once it was added; it ends when it may not be."""
        record = self._lookup.record(session.realm_id, session.identity.encode())
        if record is None:
            if realm is None or not realm.enrolls:
                session.stop("removed")
            return
        outcome = refusal(record, session.address, now)
        if outcome is not Outcome.OK:
            session.stop(outcome.value)
            return
        self._sessions.remove(NEWCOMER, session)
        session.device_id, session.credential_id = record.device_id, record.credential_id
        self._sessions.add(record.device_id, session)
        self.file_end(session, record.not_after)
        if realm is not None:
            self._used[record.credential_id] = now
            self._report_limited(session, realm, now)

    def _realms_changed(
        self, realms: dict[int, RealmRecord], sessions: "Iterable[DeviceConnection]", now: float
    ) -> None:
        """Live sessions are used on every day of service, and count for a limit that came later."""
        for session in sessions:
            realm = realms.get(session.realm_id)
            if realm is None or session.device_id == NEWCOMER:
                continue
            if session.service_day != realm.service_day:
                session.service_day = realm.service_day
                self._used[session.credential_id] = now
            self._report_limited(session, realm, session.since)

    def _report_limited(self, session: "DeviceConnection", realm: RealmRecord, since: float) -> None:
        limit = self._limit if realm.sessions_per_device is None else realm.sessions_per_device
        if not limit and not self._limited:
            return
        if self._limited.get(session.session_id, 0) == limit:
            return
        if limit:
            self._limited[session.session_id] = limit
            self._tell(SessionOpened(session.device_id, session.session_id, since, limit))
        elif self._limited.pop(session.session_id, None) is not None:
            self._tell(SessionClosed(session.device_id, session.session_id))
