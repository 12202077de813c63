"""Which sessions of a device have to end."""

from gateway.server.sessions.takeover import LimitedSession, LimitedSessions


def session(number: int, worker: str = "worker-0") -> LimitedSession:
    return LimitedSession(float(number), f"s{number}", worker)


def test_the_newest_stay_whatever_order_they_are_told_in() -> None:
    sessions = LimitedSessions()
    assert sessions.opened(7, session(2), 2) == []
    assert sessions.opened(7, session(1, "worker-1"), 2) == []
    assert sessions.opened(7, session(3), 2) == [session(1, "worker-1")]
    assert sessions.opened(7, session(0), 2) == [session(0)]
    assert sessions.opened(8, session(9), 1) == []


def test_a_lower_limit_ends_several_and_a_session_told_twice_counts_once() -> None:
    sessions = LimitedSessions()
    for number in range(4):
        assert sessions.opened(7, session(number), 4) == []
    assert sessions.opened(7, session(3), 1) == [session(0), session(1), session(2)]


def test_what_is_gone_does_not_count() -> None:
    sessions = LimitedSessions()
    sessions.opened(7, session(1), 1)
    sessions.closed(7, "s1")
    assert sessions.opened(7, session(2, "worker-1"), 1) == []
    sessions.worker_ended("worker-1")
    assert sessions.opened(7, session(3), 1) == []
    sessions.closed(7, "s3")
    sessions.closed(7, "s3")
    assert sessions._by_device == {}
