"""What ends a session besides its traffic, and what is reported of it."""

import dataclasses
from typing import Any, cast

import msgspec
import pytest

from gateway.registry.records import CredentialRecord, RealmRecord
from gateway.server.admission.lookup import NEWCOMER, DeviceLookup
from gateway.server.connections.life import REPORT_EVERY_S, SessionLife
from gateway.server.control.messages import Message, Newcomers, SessionClosed, SessionOpened, Used
from gateway.server.sessions.index import SessionIndex

NOW = 1_000_000.0
REALM = RealmRecord(1, "r", None, service_day=5)


@dataclasses.dataclass(eq=False)
class Session:
    """As a connection is, as far as its life goes."""

    session_id: str
    device: str = "m"
    realm: str = "r"
    realm_id: int = 1
    device_id: int = 7
    credential_id: int = 70
    identity: str = "m"
    address: str = "192.0.2.1"
    not_after: float | None = None
    service_day: int = 5
    since: float = NOW
    is_live: bool = True
    stopped: str = ""

    def stop(self, reason: str) -> None:
        self.stopped, self.is_live = reason, False


def record(session: Session, **changes: Any) -> CredentialRecord:
    return CredentialRecord(
        session.credential_id, session.device_id, 1, "m", None, {}, False, False, None,
        **{"not_after": None, "networks": (), "hash": "sha256", "sealed_key": b"", "used_on": 5} | changes,
    )  # fmt: skip


def why_ended(session: Session) -> str:
    return session.stopped


class Lookup:
    """What the registry says just now."""

    def __init__(self) -> None:
        self.realms = {"r": REALM}
        self.records: dict[str, CredentialRecord] = {}

    def record(self, _realm_id: int, identity: bytes) -> CredentialRecord | None:
        return self.records.get(identity.decode())


class Bench:
    """A life with everything around it."""

    def __init__(self, limit: int = 0) -> None:
        self.lookup = Lookup()
        self.told: list[Message] = []
        self.revocations: list[float] = []
        self.index: SessionIndex[Any] = SessionIndex()
        self.life = SessionLife(
            self.index,
            cast("DeviceLookup", self.lookup),
            limit,
            self.told.append,
            self.revocations.append,
        )

    def open(self, session: Session, realm: RealmRecord = REALM, **changes: Any) -> None:
        self.life.opened(cast("Any", session), record(session, **changes), realm, NOW)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_session_ends_with_its_credential(bench: Bench) -> None:
    session, other = Session("a"), Session("b")
    bench.open(session, not_after=NOW + 10)
    bench.open(other, not_after=None)
    bench.life.tick(NOW + 9.9)
    assert not why_ended(session)
    bench.life.tick(NOW + 10.1)
    assert (session.stopped, other.stopped) == ("expired", "")
    assert bench.revocations == [pytest.approx(0.1)]


def test_an_end_may_move_both_ways(bench: Bench) -> None:
    session = Session("a")
    bench.open(session, not_after=NOW + 10)
    bench.life.file_end(cast("Any", session), NOW + 20)
    bench.life.tick(NOW + 15)
    assert not why_ended(session)
    bench.life.file_end(cast("Any", session), NOW + 17)
    bench.life.tick(NOW + 17)
    assert why_ended(session)
    forever = Session("b")
    bench.open(forever, not_after=NOW + 10)
    bench.life.file_end(cast("Any", forever), None)
    bench.life.tick(NOW + 1e9)
    assert not why_ended(forever)


def test_ends_of_sessions_that_are_gone_do_not_pile_up(bench: Bench) -> None:
    for number in range(10_000):
        session = Session(str(number))
        bench.open(session, not_after=NOW + 1e8)
        bench.life.closed(cast("Any", session))
    assert len(bench.life._ends) < 200


def test_a_use_is_reported_once_a_day_of_service(bench: Bench) -> None:
    session = Session("a")
    bench.open(session, used_on=4)
    bench.open(Session("b", device_id=8, credential_id=80), used_on=5)
    bench.life.tick(NOW)
    assert bench.told == [Used({70: NOW})]
    bench.told.clear()
    bench.life.tick(NOW + REPORT_EVERY_S)
    bench.life.changed(NOW, realms=True)
    bench.life.tick(NOW + 2 * REPORT_EVERY_S)
    assert bench.told == [], "it is the same day"
    bench.lookup.realms["r"] = msgspec.structs.replace(REALM, service_day=6)
    bench.life.changed(NOW + 9, realms=True)
    bench.life.report()
    assert bench.told == [Used({70: NOW + 9, 80: NOW + 9})], "live sessions report daily"


def test_sessions_with_a_limit_are_told_of() -> None:
    bench = Bench(limit=2)
    session = Session("a")
    bench.open(session)
    assert bench.told == [SessionOpened(7, "a", NOW, 2)]
    bench.life.closed(cast("Any", session))
    assert bench.told[1:] == [SessionClosed(7, "a")]
    free = Session("b")
    bench.open(free, msgspec.structs.replace(REALM, sessions_per_device=0))
    bench.life.closed(cast("Any", free))
    assert len(bench.told) == 2, "the realm has its own limit: none"


def test_a_limit_that_comes_later_counts_for_live_sessions(bench: Bench) -> None:
    session = Session("a", since=NOW - 50)
    bench.open(session)
    assert bench.told == []
    bench.lookup.realms["r"] = msgspec.structs.replace(REALM, sessions_per_device=1)
    bench.life.changed(NOW, realms=True)
    bench.life.changed(NOW, realms=True)
    assert bench.told == [SessionOpened(7, "a", NOW - 50, 1)]
    bench.lookup.realms["r"] = REALM
    bench.life.changed(NOW, realms=True)
    assert bench.told[1:] == [SessionClosed(7, "a")]


def test_a_newcomer_is_told_of_until_it_is_a_device(bench: Bench) -> None:
    bench.lookup.realms["r"] = realm = msgspec.structs.replace(REALM, enrolls=True)
    session = Session("a", device_id=NEWCOMER, credential_id=0, identity="m")
    bench.open(session, realm)
    for moment in (NOW, NOW + REPORT_EVERY_S):
        bench.life.tick(moment)
    assert bench.told == [Newcomers([(1, "m", "192.0.2.1")])] * 2
    bench.life.changed(NOW, realms=False)
    assert not why_ended(session)

    bench.lookup.records["m"] = record(Session("-", device_id=9, credential_id=90), not_after=NOW + 5)
    bench.life.changed(NOW, realms=False)
    assert (session.device_id, session.credential_id, session.not_after) == (9, 90, NOW + 5)
    assert bench.index.of_devices([(9, 9)]) == [session]
    assert bench.index.of_devices([(NEWCOMER, NEWCOMER)]) == []
    bench.life.tick(NOW + 6)
    assert why_ended(session) == "expired"


def test_a_newcomer_that_is_gone_is_told_of_all_the_same(bench: Bench) -> None:
    session = Session("a", device_id=NEWCOMER)
    bench.open(session)
    bench.life.closed(cast("Any", session))
    bench.life.tick(NOW)
    assert bench.told == [Newcomers([(1, "m", "192.0.2.1")])]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"revoked": True}, "revoked"), ({"networks": ("10.0.0.0/8",)}, "address_refused")],
)
def test_a_newcomer_that_may_not_be_a_device_ends(bench: Bench, changes: dict[str, Any], reason: str) -> None:
    session = Session("a", device_id=NEWCOMER)
    bench.open(session)
    bench.lookup.records["m"] = msgspec.structs.replace(record(session), **changes)
    bench.life.changed(NOW, realms=False)
    assert why_ended(session) == reason


def test_a_newcomer_ends_when_its_realm_enrols_nobody_any_more(bench: Bench) -> None:
    session = Session("a", device_id=NEWCOMER)
    bench.open(session)
    bench.life.changed(NOW, realms=True)
    assert why_ended(session) == "removed"
