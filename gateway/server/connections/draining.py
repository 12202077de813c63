"""How a worker lets its sessions end: at once, or spread over a time, so that devices do not all come back in one second."""

import asyncio
import math
from collections.abc import Iterable
from typing import Final

from gateway.server.connections.deadlines import TICK_S, Deadlines
from gateway.server.connections.ending import LIVE, STOP_S, EndingConnection
from gateway.server.connections.proxied import ProxiedConnection

__all__ = ["end_all", "end_spread"]

_SETTLE_SHARE: Final = 0.8
"""Of the drain window: so long may backends take for what was received; the rest is for the last words."""
_SPREAD_SHARE: Final = 0.7
"""Of the drain window: within this part sessions are told to end; the rest is for the last of them."""
_STEP_S: Final = 0.05

Connection = EndingConnection | ProxiedConnection


async def end_all(connections: Deadlines[Connection], within_s: float, reason: str) -> None:
    """End every session and handshake now, and wait for them, `within_s` seconds at most."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    for connection in connections:
        connection.stop(reason, max(STOP_S, _SETTLE_SHARE * within_s))
    await _until_gone(connections, deadline)


async def end_spread(connections: Deadlines[Connection], within_s: float, reason: str) -> None:
    """End every session, each at its own time within `within_s` seconds. Handshakes may finish until the end comes."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    last, deadline = began + _SPREAD_SHARE * within_s, began + within_s
    ended: set[Connection] = set()
    while (now := loop.time()) < last and any(True for _ in connections):
        live = [each for each in connections if each.phase is LIVE and each not in ended]
        due = math.ceil((len(ended) + len(live)) * (now - began) / (last - began))
        some = live[: max(0, due - len(ended))]
        _stop(some, deadline - now, reason)
        ended.update(some)
        await asyncio.sleep(_STEP_S)
    _stop(
        (each for each in connections if each.phase is LIVE and each not in ended),
        deadline - loop.time(),
        reason,
    )
    await _until_gone(connections, max(deadline - _STEP_S, loop.time()))
    for connection in connections:
        if connection not in ended:  # a handshake that did not end: a silent peer
            connection.stop(reason)


def _stop(connections: Iterable[Connection], within_s: float, reason: str) -> None:
    for connection in connections:
        connection.stop(reason, max(STOP_S, _SETTLE_SHARE * within_s))


async def _until_gone(connections: Deadlines[Connection], deadline: float) -> None:
    loop = asyncio.get_running_loop()
    while any(True for _ in connections) and loop.time() < deadline:  # noqa: ASYNC110 - thousands end at once
        await asyncio.sleep(TICK_S / 5)
