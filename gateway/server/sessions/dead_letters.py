"""What operators do with dead letters: each worker answers for the spools that it owns, the supervisor puts it together.

Over the control socket and not by the files: each file has one owner, who counts what is in it, and a retried message
has to reach that owner's deliverer. While the gateway is stopped nothing can be delivered anyway.
"""

from collections.abc import Sequence
from typing import cast

from gateway.errors import ControlError, SpoolError
from gateway.forward.outbox import DeadLetter
from gateway.server.control.messages import (
    DeadLetterInfo,
    DeadLetters,
    DiscardDeadLetters,
    Done,
    ListDeadLetters,
    Message,
    RetryDeadLetters,
)
from gateway.server.sessions.routes import LiveRoutes

__all__ = ["PAYLOAD_BYTES_MAX", "add_up", "handle_dead_letters"]

PAYLOAD_BYTES_MAX = 16 << 20
"""Of all the payloads in one list: an answer has to fit a frame of the control channel."""


async def handle_dead_letters(
    routes: LiveRoutes, message: ListDeadLetters | RetryDeadLetters | DiscardDeadLetters
) -> Message:
    """A worker's answer. Raises ControlError when a spool cannot be read or written."""
    spools = routes.spools(message.route)
    try:
        match message:
            case ListDeadLetters():
                found: list[DeadLetterInfo] = []
                for route, spool in spools:
                    letters = await spool.dead_letters(None, message.limit - len(found))
                    found += [_info(route, letter) for letter in letters]
                return DeadLetters(_bounded(found), sum(spool.dead_count for _, spool in spools))
            case RetryDeadLetters():
                return Done(sum([await spool.retry(message.ids) for _, spool in spools]))
            case DiscardDeadLetters():
                return Done(sum([await spool.discard(message.ids) for _, spool in spools]))
    except SpoolError as exc:
        raise ControlError(str(exc)) from exc


def add_up(
    message: ListDeadLetters | RetryDeadLetters | DiscardDeadLetters, answers: Sequence[Message]
) -> Message:
    """The answers of all workers as one."""
    if not isinstance(message, ListDeadLetters):
        return Done(sum(cast("Done", answer).count for answer in answers))
    lists = [cast("DeadLetters", answer) for answer in answers]
    letters = sorted((letter for each in lists for letter in each.letters), key=lambda letter: letter.at)
    return DeadLetters(_bounded(letters[: message.limit]), sum(each.total for each in lists))


def _bounded(letters: list[DeadLetterInfo]) -> list[DeadLetterInfo]:
    room = PAYLOAD_BYTES_MAX
    for index, letter in enumerate(letters):
        room -= len(letter.payload)
        if room < 0:
            return letters[: max(1, index)]
    return letters


def _info(route: str, letter: DeadLetter) -> DeadLetterInfo:
    message = letter.message
    return DeadLetterInfo(
        id=letter.id,
        route=route,
        realm=message.realm,
        device=message.device,
        identity=message.identity,
        event=message.event_id,
        received_at=message.received_at,
        at=letter.at,
        reason=letter.reason,
        payload=message.payload,
    )
