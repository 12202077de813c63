"""connect: one device in the terminal."""

import asyncio
import concurrent.futures
import contextlib
import getpass
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli.options import TEXT_BYTES_MAX, read_text_file
from gateway.errors import ConfigurationError, DeviceError

if TYPE_CHECKING:
    from gateway.device.client import DeviceClient
    from gateway.registry.sealing import Key
    from gateway.server.settings import Address

__all__ = ["app"]

app = typer.Typer()

AFTER_STDIN_S = 5.0
"""How long what the gateway still has to say is waited for at the end of stdin."""
STDIN = 0
READ_BYTES = 64 * 1024


@app.command(rich_help_panel="Devices' end")
def connect(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The gateway's listener.")],
    identity: Annotated[
        str, typer.Option("--identity", metavar="IDENTITY", help="The device's PSK identity.")
    ],
    key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File with the key in hex; `-`: the first line of stdin. Default: $PSKGW_KEY, or a prompt.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Connect as a device: lines from stdin go out, what comes back is printed."""
    from gateway.registry.identities import parse_identity, parse_key_hex
    from gateway.server.settings import Address

    try:
        target = Address.parse(address)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="HOST:PORT") from exc
    key = parse_key_hex(_key_text(key_file))
    asyncio.run(_converse(target, parse_identity(identity), key))


def _key_text(key_file: str | None) -> str:
    if key_file == "-":
        return _first_line_of_stdin()
    if key_file is not None:
        return read_text_file(Path(key_file), "key file")
    if text := os.environ.get("PSKGW_KEY"):
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass("Key (hex): ")
        except getpass.GetPassWarning:
            raise ConfigurationError(
                "there is no terminal to ask for the key: give --key-file FILE, or set PSKGW_KEY"
            ) from None


def _first_line_of_stdin() -> str:
    """Byte by byte: what stands behind it is for the device to send, and not for a buffer here."""
    line = b""
    while len(line) < TEXT_BYTES_MAX and (byte := os.read(STDIN, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode("utf-8", "replace")


async def _converse(target: "Address", identity: str, key: "Key") -> None:
    from gateway.device.client import DeviceClient

    client = await DeviceClient.connect(target.host, target.port, identity, key)
    hint = f", hint {client.hint}" if client.hint else ""
    print(f"connected to {target}: {client.version}, {client.cipher}{hint}", file=sys.stderr)
    loop = asyncio.get_running_loop()
    printing = loop.create_task(_print_received(client))
    sending = loop.create_task(_send_stdin(client))
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
        await client.close()


async def _print_received(client: "DeviceClient") -> None:
    while data := await client.receive():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


async def _send_stdin(client: "DeviceClient") -> None:
    pieces: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
    loop = asyncio.get_running_loop()

    def read_stdin() -> None:
        # A thread of its own: a terminal cannot be waited for otherwise, and at the exit nobody waits for a daemon.
        # It reads without Python's buffers, whose lock it would hold then, and that aborts the interpreter.
        # When the loop is gone, so is who would have sent the piece.
        with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):
            while piece := os.read(STDIN, READ_BYTES):
                asyncio.run_coroutine_threadsafe(pieces.put(piece), loop).result()
            asyncio.run_coroutine_threadsafe(pieces.put(b""), loop).result()

    threading.Thread(target=read_stdin, daemon=True).start()
    while piece := await pieces.get():
        await client.send(piece)
    await client.finish()
