"""Playbooks of commands on their last step: sessions whose acknowledgement a test gives by hand."""

from collections.abc import Callable, Iterator

import pytest

from gateway.errors import ControlError, LimitReached
from gateway.registry.records import CommandRecord
from gateway.server.control.messages import CommandDelivered, CommandOutcome, SendCommand
from gateway.server.sessions.commands import CommandSender

DEVICE = 7


class FakeSession:
    realm = "default"
    device = "meter-7"
    device_id = DEVICE
    takes_commands = True

    def __init__(self, session_id: str = "s1") -> None:
        self.session_id = session_id
        self.sent: list[tuple[str, bytes]] = []
        self.acknowledged: int | None = 0
        self.error: Exception | None = None

    def send_command(self, command_id: str, payload: bytes) -> int:
        if self.error is not None:
            raise self.error
        if b"\n" in payload:
            raise ControlError("a line break")
        self.sent.append((command_id, payload))
        return len(self.sent)

    def has_acknowledged(self, mark: int) -> bool | None:
        return None if self.acknowledged is None else self.acknowledged >= mark


class Desk:
    """A sender with its clock, its sessions and its replica."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sessions: list[FakeSession] = []
        self.waiting: list[CommandRecord] = []
        self.reports: list[CommandOutcome | CommandDelivered] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self.sender = CommandSender(
            sessions=lambda _device: iter(list(self.sessions)),
            waiting=lambda _device: list(self.waiting),
            report=self.reports.append,
            now=lambda: self.now,
            wall=lambda: self.now,
            later=lambda delay, call: self._timers.append((self.now + delay, call)),
        )

    def session(self, name: str = "s1") -> FakeSession:
        session = FakeSession(name)
        self.sessions.append(session)
        return session

    def queue(self, number: int, payload: bytes = b"x", expires_at: float = 1000.0) -> None:
        self.waiting.append(CommandRecord(DEVICE, number, f"c{number}", payload, expires_at))

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self._timers if timer[0] <= end]:
            first = min(due, key=lambda timer: timer[0])
            self._timers.remove(first)
            self.now = first[0]
            first[1]()
        self.now = end

    @property
    def is_idle(self) -> bool:
        return not self._timers

    def lose(self, session: FakeSession) -> None:
        self.sessions.remove(session)
        self.sender.gone(session)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.pass_time(60)
    assert desk.is_idle, "nothing is looked at when nothing is under way"


COMMAND = SendCommand("default", "meter-7", "c1", b"go", 10.0)


class TestSentBySomebodyWhoWaits:
    def test_delivered_when_acknowledged(self, desk: Desk) -> None:
        session = desk.session()
        desk.sender.send(COMMAND, session)
        desk.pass_time(1)
        assert desk.reports == []
        session.acknowledged = 1
        desk.pass_time(0.03)
        assert desk.reports == [CommandOutcome("c1", "delivered", "")]

    def test_too_late(self, desk: Desk) -> None:
        desk.sender.send(COMMAND, desk.session())
        desk.pass_time(10.1)
        (report,) = desk.reports
        assert isinstance(report, CommandOutcome)
        assert report.state == "unacknowledged"

    @pytest.mark.parametrize(("acknowledged", "state"), [(1, "delivered"), (0, "lost")])
    def test_a_session_that_ends_is_asked_once_more(self, desk: Desk, acknowledged: int, state: str) -> None:
        session = desk.session()
        desk.sender.send(COMMAND, session)
        session.acknowledged = acknowledged
        desk.lose(session)
        assert [report.state for report in desk.reports if isinstance(report, CommandOutcome)] == [state]

    def test_a_session_that_is_gone_already(self, desk: Desk) -> None:
        desk.sender.send(COMMAND, None)
        (report,) = desk.reports
        assert isinstance(report, CommandOutcome)
        assert report.state == "lost"

    @pytest.mark.parametrize("error", [ControlError("no"), LimitReached("not now")])
    def test_refused(self, desk: Desk, error: Exception) -> None:
        session = desk.session()
        session.error = error
        desk.sender.send(COMMAND, session)
        assert desk.reports == [CommandOutcome("c1", "refused", str(error))]


class TestWaiting:
    def test_one_at_a_time_in_order(self, desk: Desk) -> None:
        desk.queue(1)
        desk.queue(2)
        session = desk.session()
        desk.sender.connected(session)
        desk.pass_time(1)
        assert [command for command, _ in session.sent] == ["c1"]
        session.acknowledged = 1
        desk.pass_time(0.1)
        assert [command for command, _ in session.sent] == ["c1", "c2"]
        assert desk.reports == [CommandDelivered(DEVICE, 1)]
        session.acknowledged = 2
        desk.pass_time(0.1)
        assert desk.reports == [CommandDelivered(DEVICE, 1), CommandDelivered(DEVICE, 2)]

    def test_what_was_delivered_is_not_sent_again_while_the_replica_has_it(self, desk: Desk) -> None:
        desk.queue(1)
        session = desk.session()
        desk.sender.connected(session)
        session.acknowledged = 1
        desk.pass_time(0.1)
        desk.lose(session)
        again = desk.session("s2")
        desk.sender.connected(again)
        assert again.sent == []
        desk.waiting.clear()
        desk.sender.changed([(DEVICE, DEVICE)], [again])
        assert desk.sender._settled == {}

    def test_what_another_worker_has_delivered(self, desk: Desk) -> None:
        desk.queue(1)
        desk.sender.settled(DEVICE, 1)
        session = desk.session()
        desk.sender.connected(session)
        assert session.sent == []

    def test_what_was_lost_goes_to_another_session(self, desk: Desk) -> None:
        desk.queue(1)
        first, second = desk.session(), desk.session("s2")
        desk.sender.connected(first)
        desk.sender.connected(second)
        assert second.sent == []
        desk.lose(first)
        assert [command for command, _ in second.sent] == ["c1"]
        second.acknowledged = 1
        desk.pass_time(0.1)
        assert desk.reports == [CommandDelivered(DEVICE, 1)]

    def test_expired_ones_and_those_that_do_not_fit_are_passed_over(self, desk: Desk) -> None:
        desk.queue(1, expires_at=99.0)
        desk.queue(2, b"two\nlines")
        desk.queue(3)
        session = desk.session()
        desk.sender.connected(session)
        session.acknowledged = 1
        desk.pass_time(0.1)
        assert [command for command, _ in session.sent] == ["c3"]
        assert desk.reports == [CommandDelivered(DEVICE, 3)]
        desk.lose(session)
        assert desk.sender._unfit == {}

    def test_a_device_that_does_not_read_is_tried_again(self, desk: Desk) -> None:
        desk.queue(1)
        session = desk.session()
        session.error = LimitReached("not now")
        desk.sender.connected(session)
        assert session.sent == []
        session.error = None
        session.acknowledged = 1
        desk.pass_time(2)
        assert desk.reports == [CommandDelivered(DEVICE, 1)]

    def test_a_route_without_commands(self, desk: Desk) -> None:
        desk.queue(1)
        session = desk.session()
        session.takes_commands = False
        desk.sender.connected(session)
        assert session.sent == []
