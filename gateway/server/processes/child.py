"""What worker and follower have in common: how a child of the supervisor begins and ends."""

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.net.loop import run
from gateway.server.control.channel import Channel, Handler
from gateway.server.control.messages import Configure, Metrics
from gateway.server.processes.hardening import harden

__all__ = ["configured", "live", "run_child"]


def run_child(main: Coroutine[Any, Any, None]) -> None:
    """Be a child process. Ctrl-C reaches the whole terminal; it is the supervisor's to answer."""
    harden()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(main)
    gc.freeze()  # the end of a process need not look through all that it holds


async def configured(control_fd: int) -> tuple[Channel, Configure]:
    """The supervisor's channel, and the first that comes over it."""
    channel = await Channel.over(socket.socket(fileno=control_fd))
    configuration = await channel.receive_first()
    assert isinstance(configuration, Configure)
    return channel, configuration


async def live(
    life: Coroutine[Any, Any, None],
    channel: Channel,
    handle: Handler,
    end: Callable[[], None],
    metrics: Callable[[], Metrics],
) -> None:
    """Run `life`, which `end` lets return: on SIGTERM, and when the supervisor is gone. The last metrics are the good-bye."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end)
    channel.handler = handle
    serving = loop.create_task(channel.serve())
    serving.add_done_callback(lambda _: end())
    try:
        await life
    finally:
        channel.notify(metrics())
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await channel.finish()
