"""Who is served first."""

import asyncio
import select
import socket
from collections.abc import Iterator

import pytest

from gateway.net import poller as module
from gateway.net.poller import Poller


class Served:
    """Reads a byte when it is served, and remembers in which order."""

    def __init__(self, sock: socket.socket, name: str, order: list[str], *, is_newcomer: bool) -> None:
        self._sock = sock
        self._name = name
        self._order = order
        self.is_newcomer = is_newcomer

    def ready(self, _events: int) -> None:
        self._sock.recv(1)
        self._order.append(self._name)


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(module._NEWCOMERS_MAX + 3)]
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


def test_sessions_are_served_before_newcomers_and_those_some_at_a_time(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    order: list[str] = []

    async def serve() -> None:
        poller = Poller(asyncio.get_running_loop())
        last = len(pairs) - 1
        for number, (ours, theirs) in enumerate(pairs):
            name = "session" if number == last else "newcomer"
            poller.add(
                ours.fileno(),
                Served(ours, name, order, is_newcomer=number != last),
                select.EPOLLIN | select.EPOLLET,
            )
            theirs.send(b"x")
        poller._ready()
        assert order == ["session"] + ["newcomer"] * module._NEWCOMERS_MAX
        pairs[last][1].send(b"x")
        poller._ready()  # the session has something to say again: it does not wait for those that wait
        assert order[1 + module._NEWCOMERS_MAX :] == ["session"] + ["newcomer"] * 2
        assert not poller.is_behind
        poller.close()

    asyncio.run(serve())


def test_those_that_wait_are_served_without_another_event(
    pairs: list[tuple[socket.socket, socket.socket]],
) -> None:
    order: list[str] = []

    async def serve() -> None:
        poller = Poller(asyncio.get_running_loop())
        for ours, theirs in pairs:
            newcomer = Served(ours, "newcomer", order, is_newcomer=True)
            poller.add(ours.fileno(), newcomer, select.EPOLLIN | select.EPOLLET)
            theirs.send(b"x")
        async with asyncio.timeout(5):
            while len(order) < len(pairs):  # noqa: ASYNC110 - turns of the loop are what is waited for
                await asyncio.sleep(0)
        poller.close()

    asyncio.run(serve())
