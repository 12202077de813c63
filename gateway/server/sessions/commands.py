"""Commands on the last step of their way: from a worker to a connected device.

Theory of operation. A command is framed into one live session and is delivered when the device's TCP has acknowledged
every byte of it: until then it may be lost with the connection. What is under way is looked at every POLL_S, by asking
the kernel how much of the connection is acknowledged; nothing is asked while nothing is under way.

Two kinds come here. One that an operator or a broker sends names a session and is reported once, whatever becomes of
it. One that waits in the registry is found in the replica, when its device connects or when the device changes; of
these a session gets one at a time, in order, and it goes on waiting until it was delivered. What was delivered is
remembered until the replica no longer has it, so that a device that reconnects does not get it again from this node.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import structlog

from gateway.errors import ControlError, LimitReached
from gateway.registry.records import CommandRecord
from gateway.server.control.messages import CommandDelivered, CommandOutcome, SendCommand

__all__ = ["POLL_S", "CommandSender", "CommandSession"]

log = structlog.get_logger()

POLL_S: Final = 0.02
"""How often what is under way is looked at: within the round trip of a mobile network."""
_SLOW_S: Final = 1.0
"""When to try again with a device that does not read just now."""


class CommandSession(Protocol):
    """A live session, as commands see it."""

    @property
    def device_id(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def realm(self) -> str: ...

    @property
    def session_id(self) -> str: ...

    @property
    def takes_commands(self) -> bool:
        """Whether it is live, on a route that has commands."""

    def send_command(self, command_id: str, payload: bytes) -> int:
        """Send; gives the mark that `has_acknowledged` takes.

        Raises ControlError when this session cannot carry it, LimitReached when it cannot just now.
        """

    def has_acknowledged(self, mark: int) -> bool | None:
        """Whether the device's TCP has everything up to `mark`; None when the connection is gone."""


@dataclasses.dataclass(slots=True)
class _UnderWay:
    """A command that was sent and is not acknowledged yet."""

    session: CommandSession
    mark: int
    command_id: str
    give_up_at: float | None
    """in seconds of the loop's clock; None: as long as the connection lives"""
    waiting: CommandRecord | None
    """what it is in the registry, when it waits there"""


class CommandSender:
    """All commands of one worker.

    Args:
        sessions: the live sessions of a device, by its id.
        waiting: what the replica has for a device, in order.
        report: tells the supervisor.
        now: the loop's clock; `wall` gives Unix seconds.
        later: runs a function after so many seconds.

    """

    def __init__(
        self,
        *,
        sessions: Callable[[int], Iterable[CommandSession]],
        waiting: Callable[[int], Sequence[CommandRecord]],
        report: Callable[[CommandOutcome | CommandDelivered], None],
        now: Callable[[], float],
        wall: Callable[[], float],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._sessions = sessions
        self._waiting = waiting
        self._report = report
        self._now = now
        self._wall = wall
        self._later = later
        self._under_way: list[_UnderWay] = []
        self._is_looking = False
        self._settled: dict[int, set[int]] = {}
        self._slow: set[int] = set()
        self._unfit: dict[str, set[int]] = {}
        """session id -> numbers of waiting commands that it cannot take: told once, and not tried again"""

    # Sent by somebody who waits

    def send(self, command: SendCommand, session: CommandSession | None) -> None:
        """Send a command to one session, and report what becomes of it."""
        if session is None:
            self._report(CommandOutcome(command.id, "lost", "the device has just disconnected"))
            return
        try:
            mark = session.send_command(command.id, command.payload)
        except (ControlError, LimitReached) as exc:
            self._report(CommandOutcome(command.id, "refused", str(exc)))
            return
        self._watch(_UnderWay(session, mark, command.id, self._now() + command.timeout_s, None))

    # Waiting in the registry

    def connected(self, session: CommandSession) -> None:
        """A device has connected: send it the first command that waits."""
        if (waiting := self._waiting(session.device_id)) and session.takes_commands:
            self._send_next(session, waiting)

    def changed(self, ranges: Iterable[tuple[int, int]], sessions: Iterable[CommandSession]) -> None:
        """The replica has changed for devices in these ranges; these are their live sessions."""
        ranges = tuple(ranges)
        for device_id in [each for each in self._settled if any(a <= each <= b for a, b in ranges)]:
            self._settled[device_id] &= {command.number for command in self._waiting(device_id)}
            if not self._settled[device_id]:
                del self._settled[device_id]
        for session in sessions:
            self.connected(session)

    def settled(self, device_id: int, number: int) -> None:
        """One was delivered, here or by another worker of the node."""
        self._settled.setdefault(device_id, set()).add(number)

    def _send_next(self, session: CommandSession, waiting: Sequence[CommandRecord]) -> None:
        """Send the first that waits, unless this session has one under way."""
        under_way = {each.waiting.number for each in self._under_way if each.waiting is not None}
        if any(each.waiting is not None and each.session is session for each in self._under_way):
            return
        done = (
            self._settled.get(session.device_id, set())
            | self._unfit.get(session.session_id, set())
            | under_way
        )
        now = self._wall()
        for command in waiting:
            if command.number in done or command.expires_at <= now:
                continue
            try:
                mark = session.send_command(command.command_id, command.payload)
            except LimitReached:
                self._try_again(session.device_id)
                return
            except ControlError as exc:
                self._unfit.setdefault(session.session_id, set()).add(command.number)
                log.warning(
                    "command_unfit",
                    device=session.device,
                    realm=session.realm,
                    session=session.session_id,
                    command=command.command_id,
                    reason=str(exc),
                )
                continue
            self._watch(_UnderWay(session, mark, command.command_id, None, command))
            return

    def _try_again(self, device_id: int) -> None:
        """A device does not read just now: go on in a while, once."""
        if device_id not in self._slow:
            self._slow.add(device_id)
            self._later(_SLOW_S, functools.partial(self._go_on, device_id))

    def _go_on(self, device_id: int) -> None:
        """Send the next one to whichever sessions the device has now."""
        self._slow.discard(device_id)
        for session in self._sessions(device_id):
            self.connected(session)

    def gone(self, session: CommandSession) -> None:
        """A session has ended, and is in no index any more. Its kernel can still be asked, for the last time."""
        if self._unfit:
            self._unfit.pop(session.session_id, None)
        if not self._under_way:
            return
        items = [item for item in self._under_way if item.session is session]
        for item in items:
            self._under_way.remove(item)
            self._ended(item, delivered=session.has_acknowledged(item.mark) is True)

    # What is under way

    def _watch(self, item: _UnderWay) -> None:
        self._under_way.append(item)
        if not self._is_looking:
            self._is_looking = True
            self._later(POLL_S, self._look)

    def _look(self) -> None:
        """See what was acknowledged, what was lost, and what took too long."""
        now = self._now()
        items, self._under_way = self._under_way, []
        ended: list[tuple[_UnderWay, bool]] = []
        for item in items:
            acknowledged = item.session.has_acknowledged(item.mark)
            if acknowledged or acknowledged is None:
                ended.append((item, acknowledged is True))
            elif item.give_up_at is not None and now >= item.give_up_at:
                self._report(
                    CommandOutcome(
                        item.command_id, "unacknowledged", "the device has not acknowledged it yet"
                    )
                )
            else:
                self._under_way.append(item)
        for item, delivered in ended:
            self._ended(item, delivered=delivered)
        self._is_looking = bool(self._under_way)
        if self._is_looking:
            self._later(POLL_S, self._look)

    def _ended(self, item: _UnderWay, *, delivered: bool) -> None:
        waiting = item.waiting
        if waiting is None:
            outcome = (
                ("delivered", "")
                if delivered
                else ("lost", "the connection broke before it was acknowledged")
            )
            self._report(CommandOutcome(item.command_id, *outcome))
            return
        if delivered:
            log.debug(
                "command_delivered",
                device=item.session.device,
                realm=item.session.realm,
                session=item.session.session_id,
                command=item.command_id,
            )
            self.settled(waiting.device_id, waiting.number)
            self._report(CommandDelivered(waiting.device_id, waiting.number))
        self._go_on(waiting.device_id)
