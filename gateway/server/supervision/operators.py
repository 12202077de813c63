"""The control socket: what operators ask of a running gateway, and what its processes answer, put together."""

import asyncio
import functools
import socket
from collections.abc import Awaitable, Callable
from typing import Final, cast

import structlog

from gateway.errors import ControlError
from gateway.server.control.channel import Channel, serve_unix
from gateway.server.control.messages import (
    CountLoad,
    DiscardDeadLetters,
    Done,
    DrainNode,
    Kick,
    ListDeadLetters,
    ListSessions,
    Load,
    Message,
    RetryDeadLetters,
    SendCommand,
    Sessions,
)
from gateway.server.control.trace_messages import StartTrace
from gateway.server.sessions.dead_letters import add_up
from gateway.server.supervision.crew import Crew
from gateway.server.supervision.dispatch import CommandDispatch
from gateway.server.supervision.trace_relay import TraceRelay

__all__ = ["Operators"]

log = structlog.get_logger()

_ASK_TIMEOUT_S: Final = 5.0
_DEAD_LETTERS_TIMEOUT_S: Final = 50.0
"""Writing back a gigabyte takes a while."""


class Operators:
    """Answers every operator that connects, from `open` to `close`.

    Args:
        crew: the workers, who know most of what is asked.
        commands: takes commands to devices.
        traces: takes traces of devices.
        drain: lets this node run empty within so many seconds.
        is_draining: whether it does, or has.

    """

    def __init__(
        self,
        crew: Crew,
        commands: CommandDispatch,
        traces: TraceRelay,
        drain: Callable[[float], Awaitable[None]],
        is_draining: Callable[[], bool],
    ) -> None:
        self._crew = crew
        self._commands = commands
        self._traces = traces
        self._drain = drain
        self._is_draining = is_draining
        self._server: asyncio.Server

    async def open(self, sock: socket.socket) -> None:
        """Serve on a listening socket, which stays the caller's."""
        self._server = await serve_unix(sock.dup(), self._connected)

    def close(self) -> None:
        """Serve nobody any more; the socket takes connections for whoever serves on it next."""
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        channel.handler = functools.partial(self._answer, channel)
        try:
            await channel.serve()
        finally:
            self._traces.gone(channel)

    async def _answer(self, operator: Channel, message: Message) -> Message | None:
        match message:
            case StartTrace():
                return self._traces.begin(message, operator)
            case ListSessions():
                answers = await self._ask(message)
                return Sessions(
                    [session for answer in answers for session in cast("Sessions", answer).sessions]
                )
            case ListDeadLetters() | RetryDeadLetters() | DiscardDeadLetters():
                return add_up(message, await self._ask(message, _DEAD_LETTERS_TIMEOUT_S))
            case Kick():
                count = sum(cast("Done", answer).count for answer in await self._ask(message))
                log.info("kicked", realm=message.realm, device=message.device, sessions=count)
                return Done(count)
            case SendCommand():
                return await self._commands.send(message)
            case DrainNode() | CountLoad():
                if isinstance(message, DrainNode):
                    await self._drain(message.within_s)
                return await self._load()
            case _:
                raise ControlError(
                    f"this gateway does not know {type(message).__name__}: are both of one version?"
                )

    async def _ask(self, message: Message, timeout_s: float = _ASK_TIMEOUT_S) -> list[Message]:
        return [answer for _, answer in await self._crew.ask(message, timeout_s)]

    async def _load(self) -> Load:
        loads = [cast("Load", answer) for answer in await self._ask(CountLoad())]
        return Load(
            sum(load.connections for load in loads),
            sum(load.sessions for load in loads),
            sum(load.messages for load in loads),
            is_draining=self._is_draining(),
        )
