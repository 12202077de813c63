"""What a gateway says to a device on a framed route, from frames to values.

Each frame begins with one word: `ok N`, `error N REASON`, `reply N PAYLOAD`, `command ID PAYLOAD`. N counts the frames of
the session from 1, and every one gets exactly one answer, in order.
"""

import dataclasses

__all__ = ["Answer", "Command", "Receipt", "Reply", "decode_incoming"]


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """A message is safe at the gateway. `reply` is what the backend answered, on a route that carries replies."""

    message_id: str
    reply: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """The backend's answer to one message of this device."""

    message_id: str
    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """Something that an operator or a backend sends to this device."""

    command_id: str
    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The answer to frame `number` of the session. `reason`: why it was refused; None: it is safe."""

    number: int
    reason: str | None = None
    reply: bytes | None = None


def decode_incoming(frame: bytes) -> Answer | Command:
    """One frame from a gateway. Raises ValueError for one that no gateway sends."""
    word, _, rest = frame.partition(b" ")
    first, space, payload = rest.partition(b" ")
    if word == b"command" and first:
        return Command(first.decode("utf-8", "replace"), payload)
    if not first.isdigit() or len(first) > 20:  # noqa: PLR2004 -- more digits than any count of frames has
        raise ValueError("neither an answer nor a command")
    number = int(first)
    if word == b"ok" and not space:
        return Answer(number)
    if word == b"error" and payload:
        return Answer(number, payload.decode("ascii", "replace"))
    if word == b"reply":
        return Answer(number, None, payload)
    raise ValueError("neither an answer nor a command")
