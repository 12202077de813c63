"""The control channel, over real sockets."""

import asyncio
import socket
from pathlib import Path

import pytest

from gateway.errors import ControlError
from gateway.net.loop import run
from gateway.server.control.channel import Answer, Channel, Handler, connect_unix, unix_listener
from gateway.server.control.messages import Done, Drain, Kick, Message


async def pair(
    handler: Handler,
) -> tuple[Channel, asyncio.Task[None], Channel, asyncio.Task[None]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    near, far = await Channel.over(ours), await Channel.over(theirs, handler)
    loop = asyncio.get_running_loop()
    return near, loop.create_task(near.serve()), far, loop.create_task(far.serve())


def test_calls_notifications_and_failures() -> None:
    heard: list[Message] = []

    async def handler(message: Message) -> Message | None:
        heard.append(message)
        if isinstance(message, Kick):
            if message.device == "nobody":
                raise ControlError("there is nobody")
            return Done(3)
        return None

    async def scenario() -> None:
        near, near_task, _, far_task = await pair(handler)
        near.notify(Drain(1.5))
        assert await near.call(Kick("r", "d"), 5) == Done(3)
        with pytest.raises(ControlError, match="there is nobody"):
            await near.call(Kick("r", "nobody"), 5)
        assert heard == [Drain(1.5), Kick("r", "d"), Kick("r", "nobody")]
        near.close()
        await asyncio.wait_for(asyncio.gather(near_task, far_task), 5)

    run(scenario())


def test_a_call_that_nobody_answers_ends_at_its_deadline() -> None:
    async def never(_: Message) -> Message | None:
        await asyncio.Event().wait()
        return None

    async def scenario() -> None:
        near, near_task, _, far_task = await pair(never)
        with pytest.raises(ControlError, match=r"within 0\.05 s"):
            await near.call(Drain(1), 0.05)
        far_task.cancel()
        near.close()
        await asyncio.wait_for(near_task, 5)

    run(scenario())


def test_a_call_fails_when_the_other_end_goes() -> None:
    closing = asyncio.Event()

    async def hang_up(_: Message) -> Message | None:
        closing.set()
        await asyncio.Event().wait()
        return None

    async def scenario() -> None:
        near, near_task, far, far_task = await pair(hang_up)
        calling = asyncio.get_running_loop().create_task(near.call(Drain(1), 5))
        await closing.wait()
        far_task.cancel()
        far.close()
        with pytest.raises(ControlError, match="closed the control channel"):
            await calling
        await asyncio.wait_for(near_task, 5)

    run(scenario())


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x04abcd", b"\x00"]
)
def test_garbage_ends_the_channel(garbage: bytes) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        channel = await Channel.over(theirs)
        ours.sendall(garbage)
        ours.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(channel.serve(), 5)
        ours.close()

    run(scenario())


def test_a_socket_of_our_own_with_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    path = folder / "control.sock"

    async def handler(_: Message) -> Message | None:
        return Done(7)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Channel(reader, writer, handler).serve()

    async def scenario() -> None:
        server = await asyncio.start_unix_server(client, sock=unix_listener(path))
        assert path.stat().st_mode & 0o777 == 0o600
        async with connect_unix(path) as channel:
            assert await channel.call(Drain(1), 5) == Done(7)
        server.close()
        await server.wait_closed()
        unix_listener(path).close()  # takes the place of the dead one

    run(scenario())


def test_no_gateway_is_a_clear_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with connect_unix(tmp_path / "control.sock"):
            pass

    with pytest.raises(ControlError, match="gatewayctl run"):
        run(scenario())


def test_what_takes_long_does_not_keep_what_comes_behind_it() -> None:
    """An answer that a task gives later; its failures are answers too."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        slow: dict[str, asyncio.Future[Message]] = {
            name: loop.create_future() for name in ("a", "b", "c", "d")
        }

        async def wait(name: str) -> Message:
            return await slow[name]

        async def handler(message: Message) -> Answer:
            assert isinstance(message, Kick)
            return loop.create_task(wait(message.device)) if message.device in slow else Done(1)

        near, near_task, _, far_task = await pair(handler)
        calls = {name: loop.create_task(near.call(Kick("r", name), 5)) for name in slow}
        assert await near.call(Kick("r", "quick"), 5) == Done(1)
        assert not any(call.done() for call in calls.values())
        slow["c"].set_result(Done(7))
        slow["a"].set_exception(ControlError("the disk is gone"))
        slow["b"].set_exception(ZeroDivisionError("a secret"))
        slow["d"].cancel()
        assert await calls["c"] == Done(7)
        for name, reason in (
            ("a", "^the disk is gone$"),
            ("b", r"^internal error \(ZeroDivisionError\)"),
            ("d", "given up"),
        ):
            with pytest.raises(ControlError, match=reason):
                await calls[name]
        near.close()
        await asyncio.wait_for(asyncio.gather(near_task, far_task), 5)

    run(scenario())
