"""The index of live sessions."""

import dataclasses

from gateway.server.sessions.index import SessionIndex


@dataclasses.dataclass(frozen=True)
class Session:
    realm: str
    device: str
    number: int = 0


def test_by_ranges_of_devices() -> None:
    index: SessionIndex[Session] = SessionIndex()
    sessions = [Session("r", f"d{number}") for number in range(10)]
    for number, session in enumerate(sessions):
        index.add(number, session)
    assert index.of_devices([(3, 4), (8, 8)]) == [sessions[3], sessions[4], sessions[8]]
    assert index.of_devices([(0, 10**9)]) == sessions
    assert index.of_devices([(20, 30)]) == []
    assert len(index) == 10


def test_several_sessions_of_one_device() -> None:
    index: SessionIndex[Session] = SessionIndex()
    one, two = Session("r", "d", 1), Session("r", "d", 2)
    index.add(7, one)
    index.add(7, two)
    assert set(index.of_devices([(7, 7)])) == {one, two}
    index.remove(7, one)
    assert index.of_devices([(7, 7)]) == [two]
    index.remove(7, two)
    assert list(index) == []
    assert index._by_device == {}


def test_by_names() -> None:
    index: SessionIndex[Session] = SessionIndex()
    for number, (realm, device) in enumerate([("a", "x"), ("a", "y"), ("b", "x")]):
        index.add(number, Session(realm, device))
    assert len(index.named(None, None)) == 3
    assert index.named("a", "x") == [Session("a", "x")]
    assert len(index.named(None, "x")) == 2
    assert index.named("c", None) == []


def test_devices_that_have_no_id_yet_are_told_apart_by_name() -> None:
    """Newcomers wait for their row in the registry under the id 0."""
    index: SessionIndex[Session] = SessionIndex()
    for device in ("new-1", "new-2"):
        index.add(0, Session("a", device))
    assert index.named("a", "new-2") == [Session("a", "new-2")]
    assert index.named("a", "nobody") == []


def test_nothing_is_left_of_newcomers_nor_of_a_device_that_was_added_again() -> None:
    index: SessionIndex[Session] = SessionIndex()
    newcomers = [Session("a", "new-1"), Session("a", "new-2")]
    before, after = Session("a", "d", 1), Session("a", "d", 2)
    for session in newcomers:
        index.add(0, session)
    index.add(5, before)
    index.add(9, after)
    index.remove(5, before)
    assert index.named("a", "d") == [after]
    index.remove(9, after)
    for session in newcomers:
        index.remove(0, session)
    assert (index._by_device, [*index._ids.values()]) == ({}, [{}])
