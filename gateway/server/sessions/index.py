"""The index of a worker's live sessions: by device, for kicks, revocation and listing."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["SessionIndex"]


class Named(Protocol):
    """A session knows whose it is."""

    @property
    def realm(self) -> str: ...

    @property
    def device(self) -> str: ...


S = TypeVar("S", bound=Named)


class SessionIndex(Generic[S]):
    """Sessions whose handshake is complete. A connection adds itself once and removes itself when it is gone."""

    def __init__(self) -> None:
        self._by_device: dict[int, S | set[S]] = {}
        # A set takes 216 bytes, and nearly all devices have one session.
        self._ids: defaultdict[str, dict[str, int]] = defaultdict(dict)  # by realm and name; realms are few
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[S]:
        """All sessions, as of now: they may end while one iterates."""
        return iter([session for sessions in self._by_device.values() for session in _each(sessions)])

    def add(self, device_id: int, session: S) -> None:
        """Remember a session of this device."""
        sessions = self._by_device.get(device_id)
        if sessions is None:
            self._by_device[device_id] = session
            if device_id:  # newcomers have none of their own yet, and are looked for one by one
                self._ids[session.realm][session.device] = device_id
        elif isinstance(sessions, set):
            sessions.add(session)
        else:
            self._by_device[device_id] = {sessions, session}
        self._count += 1

    def remove(self, device_id: int, session: S) -> None:
        """Forget a session that was added."""
        sessions: S | set[S] | None = self._by_device[device_id]
        if isinstance(sessions, set):
            sessions.remove(session)
        else:
            assert sessions is session
            sessions = None
        if not sessions:
            del self._by_device[device_id]
            ids = self._ids[session.realm]
            if ids.get(session.device) == device_id:  # a device that was added again has another id
                del ids[session.device]
        self._count -= 1

    def of_devices(self, ranges: Iterable[tuple[int, int]]) -> list[S]:
        """Sessions of the devices whose ids lie in one of these ranges, both ends included."""
        found: list[S] = []
        for first, last in ranges:
            if last - first < len(self._by_device):
                ids: Iterable[int] = (
                    number for number in range(first, last + 1) if number in self._by_device
                )
            else:
                ids = [number for number in self._by_device if first <= number <= last]
            for number in ids:
                found.extend(_each(self._by_device[number]))
        return found

    def of_device(self, device_id: int) -> list[S]:
        """Sessions of one device."""
        sessions = self._by_device.get(device_id)
        return [] if sessions is None else list(_each(sessions))

    def named(self, realm: str | None, device: str | None) -> list[S]:
        """Sessions of one realm or device name, or of both; None matches all."""
        if realm is not None and device is not None and (device_id := self._ids.get(realm, {}).get(device)):
            return self.of_device(device_id)
        return [
            session
            for session in self
            if (realm is None or session.realm == realm) and (device is None or session.device == device)
        ]


def _each(sessions: S | set[S]) -> Iterable[S]:
    return sessions if isinstance(sessions, set) else (sessions,)
