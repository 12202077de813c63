"""What a backend says to a batch of messages."""

import dataclasses
from collections.abc import Mapping

from gateway.errors import BackendUnavailable

__all__ = ["Receipt"]


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome of each message of a batch. Indices count from 0 in the batch.

    `refused`: index -> one line that says why the backend will never take this message. `replies`: index -> what the
    backend answers to it. `settled`: None when all were settled, which is: are safe or refused; else how many from the
    start were, and `error` says what happened then. The rest is unknown and will be sent again.
    """

    refused: Mapping[int, str] = dataclasses.field(default_factory=dict)
    replies: Mapping[int, bytes] = dataclasses.field(default_factory=dict)
    settled: int | None = None
    error: BackendUnavailable | None = None

    def __post_init__(self) -> None:
        assert (self.settled is None) == (self.error is None)
