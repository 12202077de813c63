"""tunnel: the sidecar of a program that knows no TLS."""

import asyncio
import signal
import sys
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
    raise_file_limit,
)

if TYPE_CHECKING:
    from gateway.device.link import Dialer
    from gateway.device.tunnel import TunnelSettings
    from gateway.server.settings import Address

__all__ = ["app"]

app = typer.Typer()

FILES_PER_CONNECTION = 2
FILES_BESIDE = 64


@app.command(rich_help_panel="Devices' end")
def tunnel(  # noqa: PLR0917 -- typer takes options as parameters
    target: Annotated[
        str,
        typer.Option("--connect", metavar="HOST:PORT", help="The gateway's listener.", show_default=False),
    ],
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="HOST:PORT", help="Where plain clients connect.", show_default=False
        ),
    ] = None,
    identity: IdentityOption = None,
    key_file: KeyFileOption = None,
    hint: HintOption = None,
    key_ring: KeyRingOption = None,
    server_name: ServerNameOption = None,
    tls: TlsOption = None,
    timeout: TimeoutOption = 10.0,
    patience: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long a client waits for its connection while the gateway is away.",
        ),
    ] = 10.0,
    connections: Annotated[
        int, typer.Option(metavar="N", min=1, help="At most so many clients at a time.")
    ] = 1000,
    check: Annotated[
        bool, typer.Option("--check", help="Connect once, say what was negotiated, and end.")
    ] = False,
) -> None:
    """Listen for plain TCP and carry each connection to the gateway over TLS-PSK."""
    from gateway.device.tunnel import TunnelSettings
    from gateway.net import loop

    address = parse_address(target, "--connect")
    dialer = make_dialer(
        address,
        make_ring(identity, key_file, hint, key_ring),
        server_name=server_name,
        tls=tls,
        timeout_s=timeout,
    )
    if check:
        loop.run(_check(dialer))
        return
    if listen is None:
        raise typer.BadParameter("say where plain clients connect", param_hint="--listen")
    raise_file_limit(FILES_PER_CONNECTION * connections + FILES_BESIDE)
    loop.run(_serve(parse_address(listen, "--listen"), dialer, TunnelSettings(patience, connections)))


async def _check(dialer: "Dialer") -> None:
    from gateway.device.stream import DeviceClient

    client = await DeviceClient.dial(dialer)
    hint = f", hint {client.hint}" if client.hint else ""
    print(f"{dialer.where} takes {client.identity}: {client.version}, {client.cipher}{hint}")
    await client.close()


async def _serve(listen: "Address", dialer: "Dialer", settings: "TunnelSettings") -> None:
    from gateway.device.tunnel import Tunnel
    from gateway.net.loop import freeze
    from gateway.telemetry.logs import LogSettings, setup

    setup(LogSettings(), "tunnel")
    serving = Tunnel(dialer, settings)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    host, port = await serving.open(listen.host, listen.port)
    freeze()
    where = type(listen)(host, port)
    print(f"listening on {where}, connecting to {dialer.where}", file=sys.stderr, flush=True)
    await stopped.wait()
    await serving.close()
