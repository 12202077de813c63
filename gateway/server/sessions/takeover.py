"""Which sessions of a device are one too many, over all workers of a node: the newest stay.

Pure. The supervisor holds it, workers tell it of sessions that have a limit, and it says which of them have to end.
"""

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["LimitedSession", "LimitedSessions"]


class LimitedSession(NamedTuple):
    """One session: when it began (Unix seconds), its id, and the worker that serves it."""

    since: float
    session: str
    worker: str


class LimitedSessions:
    """The sessions of this node whose devices have a limit."""

    def __init__(self) -> None:
        self._by_device: dict[int, list[LimitedSession]] = {}

    def opened(self, device_id: int, new: LimitedSession, limit: int) -> list[LimitedSession]:
        """A session began, or its limit changed; which sessions have to end now, oldest first."""
        sessions = [each for each in self._by_device.get(device_id, []) if each.session != new.session]
        sessions = sorted([*sessions, new])
        surplus = max(0, len(sessions) - limit)
        self._by_device[device_id] = sessions[surplus:]
        return sessions[:surplus]

    def closed(self, device_id: int, session: str) -> None:
        """A session is gone, whoever ended it."""
        left = [each for each in self._by_device.get(device_id, []) if each.session != session]
        if left:
            self._by_device[device_id] = left
        else:
            self._by_device.pop(device_id, None)

    def dump(self) -> list[tuple[int, float, str, str]]:
        """All of them, for `restore`: device, beginning, session, worker."""
        return [(device_id, *each) for device_id, sessions in self._by_device.items() for each in sessions]

    def restore(self, sessions: Iterable[tuple[int, float, str, str]]) -> None:
        """Take what `dump` gave, in the same order."""
        for device_id, since, session, worker in sessions:
            self._by_device.setdefault(device_id, []).append(LimitedSession(since, session, worker))

    def worker_ended(self, worker: str) -> None:
        """All sessions of this worker are gone."""
        for device_id, sessions in list(self._by_device.items()):
            left = [each for each in sessions if each.worker != worker]
            if left:
                self._by_device[device_id] = left
            else:
                del self._by_device[device_id]
