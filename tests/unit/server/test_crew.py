"""What the supervisor keeps for workers that start."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from gateway.registry.notices import Changed, Published
from gateway.server.control import Message
from gateway.server.crew import Crew
from gateway.server.sockets import ListeningSockets


def test_what_a_full_disk_kept_from_the_replica_outlives_the_follower() -> None:
    """A follower that starts again publishes a replica that lacks it; only a newer replica has it."""

    async def scenario() -> list[bool]:
        crew = Crew(ListeningSockets(), _heard, lambda _: None, lambda _name, _by_itself: None, _unexpected)
        overlaid = []
        crew.changed(Changed(8, ((1, 1),), realms=False, committed_at=0.0, overlay={b"revoked": None}))
        overlaid.append(crew.overlay is not None)
        for generation in (Published("/replica/a", 5), Published("/replica/b", 8)):
            crew.published(generation)
            overlaid.append(crew.overlay is not None)
        return overlaid

    assert asyncio.run(scenario()) == [True, True, False]


async def _heard(_name: str, _message: Message) -> Message | None:
    return None


def _unexpected(_: Coroutine[Any, Any, None]) -> None:
    raise AssertionError("there are no workers to tell")
