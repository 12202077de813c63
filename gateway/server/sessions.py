"""The index of a worker's live sessions: by device, for kicks, revocation and listing."""

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
        self._by_device: dict[int, set[S]] = {}
        self._ids: dict[tuple[str, str], int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[S]:
        """All sessions, as of now: they may end while one iterates."""
        return iter([session for sessions in self._by_device.values() for session in sessions])

    def add(self, device_id: int, session: S) -> None:
        """Remember a session of this device."""
        sessions = self._by_device.get(device_id)
        if sessions is None:
            self._by_device[device_id] = {session}
            self._ids[session.realm, session.device] = device_id
        else:
            sessions.add(session)
        self._count += 1

    def remove(self, device_id: int, session: S) -> None:
        """Forget a session that was added."""
        sessions = self._by_device[device_id]
        sessions.remove(session)
        if not sessions:
            del self._by_device[device_id]
            self._ids.pop((session.realm, session.device), None)
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
                found.extend(self._by_device[number])
        return found

    def of_device(self, device_id: int) -> list[S]:
        """Sessions of one device."""
        return list(self._by_device.get(device_id, ()))

    def named(self, realm: str | None, device: str | None) -> list[S]:
        """Sessions of one realm or device name, or of both; None matches all."""
        if realm is not None and device is not None:
            return list(self._by_device.get(self._ids.get((realm, device), 0), ()))
        return [
            session
            for session in self
            if (realm is None or session.realm == realm) and (device is None or session.device == device)
        ]
