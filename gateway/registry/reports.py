"""What a running gateway writes to the registry: days of service, last uses in batches, first-use enrolments.

One per node, in the follower. What workers report is held here until the registry takes it; an outage delays it and
loses nothing while the process lives, and what a restart loses is reported again by live sessions. All of it is bounded
by the number of credentials, and newcomers by a limit: they are reported again as long as they are connected.
"""

import contextlib
import datetime as dt
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from gateway.errors import RegistryError, RegistryRefused
from gateway.registry.audit import Head
from gateway.registry.ledger import Author
from gateway.registry.sealing import Sealer
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry
from gateway.registry.usage import USES_PER_CHANGE

__all__ = ["Enrolment", "Newcomer", "Reports"]

_USES_EVERY_S: Final = 10.0
"""A batch of last uses is a change that every node reads; ten seconds make few of them and keep none waiting."""
_NEWCOMERS_MAX: Final = 10_000
_NEWCOMERS_AT_ONCE: Final = 20
"""In one flush: the follower looks for changes between two of them, and a revocation must not wait."""
_REFUSED_KEPT_S: Final = 60.0
"""A newcomer that was refused is not tried again for so long; its session ends when the replica says so."""


class Newcomer(NamedTuple):
    """Who proved a derived key and is no device yet."""

    realm_id: int
    identity: str
    address: str


class Enrolment(NamedTuple):
    """What became of a newcomer: a device, or why not."""

    newcomer: Newcomer
    refused: str | None


class Reports:
    """Takes reports in one thread and writes them in another, `flush`.

    Args:
        settings: where the registry is.
        sealer: with the master keys of the node.
        wall: gives the time, Unix s.

    """

    def __init__(self, settings: RegistrySettings, sealer: Sealer, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._registry = Registry(settings, Author.of_gateway(), now=self._now, sealer=sealer)
        self._is_open = False
        self._lock = threading.Lock()
        self._uses: dict[int, float] = {}
        self._newcomers: dict[tuple[int, str], Newcomer] = {}
        self._refused: dict[tuple[int, str], float] = {}
        self._uses_at = 0.0
        self._service_date: dt.date | None = None

    def add_uses(self, uses: Mapping[int, float]) -> None:
        """Credentials that were used, by id, and when (Unix s)."""
        with self._lock:
            for number, at in uses.items():
                self._uses.setdefault(number, at)

    def add_newcomers(self, newcomers: Iterable[Newcomer]) -> None:
        """Identities to be added as devices; those that are waiting or were refused just now are passed over."""
        now = self._wall()
        with self._lock:
            self._refused = {key: until for key, until in self._refused.items() if until > now}
            for newcomer in newcomers:
                key = (newcomer.realm_id, newcomer.identity)
                if key not in self._refused and len(self._newcomers) < _NEWCOMERS_MAX:
                    self._newcomers.setdefault(key, newcomer)

    @property
    def has_any(self) -> bool:
        """Whether a report waits, due or not."""
        return bool(self._newcomers or self._uses)

    @property
    def is_due(self) -> bool:
        """Whether there is something to write now."""
        if self._newcomers or self._service_date != self._now().date():
            return True
        return bool(self._uses) and not 0 <= self._wall() - self._uses_at < _USES_EVERY_S

    def flush(self) -> list[Enrolment]:
        """Write a batch of what is there; what became of newcomers.

        Raises:
            RegistryError: the registry is away or does not fit; what was not written is kept.

        """
        with self._opened() as registry:
            self._write_uses(registry)  # before the next day begins: it is this day that they happened on
            today = self._now().date()
            if self._service_date != today:
                registry.begin_service_day()
                self._service_date = today
            return [*self._enrol(registry)]

    def audit_head(self) -> Head | None:
        """The newest link of the audit. Raises RegistryError."""
        with self._opened() as registry:
            return registry.audit_head()

    def close(self) -> None:
        self._is_open = False
        self._registry.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Registry]:
        try:
            if not self._is_open:
                self._registry.open()
                self._is_open = True
            yield self._registry
        except RegistryError:
            self.close()
            raise

    def _write_uses(self, registry: Registry) -> None:
        """One batch; `is_due` says whether there are more."""
        with self._lock:
            some = dict(itertools.islice(self._uses.items(), USES_PER_CHANGE))
        if some:
            registry.record_uses({number: _moment(at) for number, at in some.items()})
        with self._lock:
            for number in some:
                del self._uses[number]
            if not self._uses:
                self._uses_at = self._wall()

    def _enrol(self, registry: Registry) -> Iterator[Enrolment]:
        for newcomer in list(itertools.islice(self._newcomers.values(), _NEWCOMERS_AT_ONCE)):
            refused = None
            try:
                added = registry.enrol_device(*newcomer)
            except RegistryRefused as exc:
                added, refused = None, str(exc)
            key = (newcomer.realm_id, newcomer.identity)
            with self._lock:
                del self._newcomers[key]
                if refused is not None:
                    self._refused[key] = self._wall() + _REFUSED_KEPT_S
            if added is not None or refused is not None:
                yield Enrolment(newcomer, refused)

    def _now(self) -> dt.datetime:
        return _moment(self._wall())


def _moment(at: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(at, dt.UTC)
