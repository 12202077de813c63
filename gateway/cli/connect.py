"""connect: one device in the terminal."""

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.dial import (
    HintOption,
    IdentityOption,
    KeyFileOption,
    KeyRingOption,
    ServerNameOption,
    TimeoutOption,
    TlsOption,
    make_dialer,
    make_ring,
    parse_address,
)
from gateway.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.device.link import Dialer
    from gateway.device.stream import DeviceClient
    from gateway.tls.openssl import Trace

__all__ = ["app"]

app = typer.Typer()

AFTER_STDIN_S = 5.0
"""How long what the gateway still has to say is waited for at the end of stdin."""
READ_BYTES = 64 * 1024


@app.command(rich_help_panel="Devices' end")
def connect(  # noqa: PLR0917 -- typer takes options as parameters
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The gateway's listener.")],
    identity: IdentityOption = None,
    key_file: KeyFileOption = None,
    hint: HintOption = None,
    key_ring: KeyRingOption = None,
    server_name: ServerNameOption = None,
    tls: TlsOption = None,
    timeout: TimeoutOption = 10.0,
    stall: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.1, help="Give up when the gateway reads nothing for so long."),
    ] = 30.0,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Show every handshake message on stderr, as `openssl s_client -msg` does."
        ),
    ] = False,
) -> None:
    """Connect as a device: lines from stdin go out, what comes back is printed."""
    from gateway.net import loop

    dialer = make_dialer(
        parse_address(address, "HOST:PORT"),
        make_ring(identity, key_file, hint, key_ring),
        server_name=server_name,
        tls=tls,
        timeout_s=timeout,
        trace=_tracer() if trace else None,
    )
    loop.run(_converse(dialer, stall))


def _tracer() -> "Trace":
    """Print the messages of the handshake, and alerts; application data is shown as what it says, and never here."""
    from gateway.wire.handshake_names import describe_message

    def show(sent: bool, version: int, content_type: int, data: bytes) -> None:
        print(
            describe_message(sent=sent, version=version, content_type=content_type, data=data),
            file=sys.stderr,
        )

    return show


async def _converse(dialer: "Dialer", stall_s: float) -> None:
    from gateway.device.stream import DeviceClient

    client = await DeviceClient.dial(dialer)
    hint = f", hint {client.hint}" if client.hint else ""
    chosen = f", identity {client.identity}" if len(dialer.ring.keys) > 1 else ""
    print(
        f"connected to {dialer.where}: {client.version}, {client.cipher}{hint}{chosen}",
        file=sys.stderr,
        flush=True,
    )
    loop = asyncio.get_running_loop()
    printing = loop.create_task(_print_received(client))
    sending = loop.create_task(_send_stdin(client, dialer, stall_s))
    try:
        await asyncio.wait({printing, sending}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            printing.result()
            raise DeviceError("the gateway closed the connection")
        sending.result()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(printing, AFTER_STDIN_S)
    finally:
        for task in (printing, sending):
            task.cancel()
        await asyncio.wait({printing, sending})
        await client.close()


async def _print_received(client: "DeviceClient") -> None:
    while data := await client.receive():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


async def _send_stdin(client: "DeviceClient", dialer: "Dialer", stall_s: float) -> None:
    async for data in _stdin():
        try:
            async with asyncio.timeout(stall_s):
                await client.send(data)
        except TimeoutError:
            raise DeviceError(
                f"{dialer.where} has read nothing for {stall_s:g} s: is its backend well? What it did not read is lost"
            ) from None
    await client.finish()


async def _stdin() -> "AsyncIterator[bytes]":
    """What stands on stdin, as it comes.

    Read by a thread of its own: neither a terminal nor a file can be waited for otherwise, and at the exit nobody waits for
    a daemon. It reads the descriptor and not `sys.stdin`, whose lock a thread that still waits would hold at the exit.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
    try:
        descriptor = sys.stdin.fileno()
    except OSError:  # stdin is no file: a test's
        yield sys.stdin.buffer.read()
        return

    def read() -> None:
        # The loop is gone or about to be, and so is who would have sent it.
        with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):
            while data := os.read(descriptor, READ_BYTES):
                asyncio.run_coroutine_threadsafe(pieces.put(data), loop).result()
            asyncio.run_coroutine_threadsafe(pieces.put(b""), loop).result()

    threading.Thread(target=read, daemon=True).start()
    while data := await pieces.get():
        yield data
