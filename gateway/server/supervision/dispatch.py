"""Commands on their way through the supervisor: find the session, hand over, wait for what becomes of it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, cast

from msgspec import structs

from gateway.errors import ControlError
from gateway.server.control.messages import CommandOutcome, ListSessions, Message, SendCommand, Sessions
from gateway.server.supervision.children import Child

__all__ = ["CommandDispatch"]

_ASK_TIMEOUT_S: Final = 5.0
_BEYOND_S: Final = 2.0
"""What a worker may take beyond the time-out of a command to say that it has passed."""


_UNDER_WAY_MAX: Final = 1_000
"""What a flood from a broker may hold in memory."""


Ask = Callable[[Message, float], Awaitable[list[tuple[Child, Message]]]]
"""Asks all workers, and waits so many seconds."""


class CommandDispatch:
    """All commands that wait for an outcome. `count` is told each outcome once."""

    def __init__(self, ask: Ask, count: Callable[[str], None]) -> None:
        self._ask = ask
        self._count = count
        self._outcomes: dict[str, asyncio.Future[CommandOutcome]] = {}

    async def send(self, command: SendCommand) -> CommandOutcome:
        """Send a command to the newest session of its device. Raises ControlError when the workers do not answer."""
        outcome = await self._send(command)
        self._count(outcome.state)
        return outcome

    def settle(self, outcome: CommandOutcome) -> None:
        """A worker says what became of a command."""
        future = self._outcomes.get(outcome.id)
        if future is not None and not future.done():
            future.set_result(outcome)

    async def _send(self, command: SendCommand) -> CommandOutcome:
        if command.id in self._outcomes:
            raise ControlError(f"command {command.id} is under way already")
        if len(self._outcomes) >= _UNDER_WAY_MAX:
            return CommandOutcome(command.id, "refused", "too many commands are under way: try again later")
        future: asyncio.Future[CommandOutcome] = asyncio.get_running_loop().create_future()
        self._outcomes[command.id] = future
        try:
            found = await self._newest_session(command)
            if found is None:
                return CommandOutcome(command.id, "not_connected", "")
            worker, session = found
            worker.notify(structs.replace(command, session=session))
            async with asyncio.timeout(command.timeout_s + _BEYOND_S):
                return await future
        except TimeoutError:
            return CommandOutcome(command.id, "lost", "the worker has not said what became of it")
        finally:
            del self._outcomes[command.id]

    async def _newest_session(self, command: SendCommand) -> tuple[Child, str] | None:
        """Where the device is; of several sessions the newest, since older ones are often dead and not yet found so."""
        answers = await self._ask(ListSessions(command.realm, command.device), _ASK_TIMEOUT_S)
        found = [
            (session.since, worker, session.session)
            for worker, answer in answers
            for session in cast("Sessions", answer).sessions
        ]
        if not found:
            return None
        _, worker, session_id = max(found, key=lambda each: each[0])
        return worker, session_id
