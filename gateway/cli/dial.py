"""What `connect`, `tunnel` and `simulate` share: the gateway's address, and who the device is."""

import getpass
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gateway.cli.options import TEXT_BYTES_MAX
from gateway.errors import ConfigurationError, DeviceError

if TYPE_CHECKING:
    from gateway.device.keyring import KeyRing
    from gateway.device.link import Dialer
    from gateway.registry.sealing import Key
    from gateway.server.settings import Address
    from gateway.tls.openssl import Trace

__all__ = [
    "HintOption",
    "IdentityOption",
    "KeyFileOption",
    "KeyRingOption",
    "ServerNameOption",
    "TimeoutOption",
    "TlsOption",
    "make_dialer",
    "make_ring",
    "parse_address",
    "raise_file_limit",
    "read_line",
]

IdentityOption = Annotated[
    str | None,
    typer.Option("--identity", metavar="IDENTITY", help="The device's PSK identity.", show_default=False),
]
KeyFileOption = Annotated[
    str | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        help="File with the key in hex, 0600; `-`: the first line of stdin. Default: $PSKGW_KEY, or a prompt.",
        show_default=False,
    ),
]
HintOption = Annotated[
    str | None,
    typer.Option(
        "--hint",
        metavar="HINT",
        help="Refuse a gateway that sends another hint (TLS 1.2).",
        show_default=False,
    ),
]
KeyRingOption = Annotated[
    Path | None,
    typer.Option(
        "--key-ring",
        metavar="FILE",
        help="Several identities and keys, chosen by the gateway's hint, in place of --identity and --key-file.",
        show_default=False,
    ),
]
ServerNameOption = Annotated[
    str | None,
    typer.Option(
        "--server-name", metavar="NAME", help="Name for SNI. Default: none is sent.", show_default=False
    ),
]
TlsOption = Annotated[
    Literal["1.2", "1.3"] | None,
    typer.Option("--tls", help="Only this version. Default: both are offered.", show_default=False),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="For name, connection and handshake.")
]


def parse_address(text: str, parameter: str) -> "Address":
    """`HOST:PORT`; wrong usage if it is not."""
    from gateway.server.settings import Address

    try:
        return Address.parse(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=parameter) from exc


def make_ring(
    identity: str | None, key_file: str | None, hint: str | None, key_ring: Path | None
) -> "KeyRing":
    """The keys that the options name."""
    from gateway.device.keyring import KeyRing

    if key_ring is not None:
        if identity is not None or key_file is not None or hint is not None:
            raise typer.BadParameter(
                "it stands in place of --identity, --key-file and --hint", param_hint="--key-ring"
            )
        return KeyRing.from_file(key_ring)
    if identity is None:
        raise typer.BadParameter("give --identity, or --key-ring", param_hint="--identity")
    return KeyRing.of(identity, _read_key(key_file), hint=hint)


def make_dialer(
    address: "Address",
    ring: "KeyRing",
    *,
    server_name: str | None = None,
    tls: Literal["1.2", "1.3"] | None = None,
    timeout_s: float = 10.0,
    trace: "Trace | None" = None,
) -> "Dialer":
    """The way to the gateway that the options name."""
    from gateway.device.link import Dialer
    from gateway.tls.openssl import TlsVersion

    lowest, highest = {
        None: (TlsVersion.TLS1_2, TlsVersion.TLS1_3),
        "1.2": (TlsVersion.TLS1_2, TlsVersion.TLS1_2),
        "1.3": (TlsVersion.TLS1_3, TlsVersion.TLS1_3),
    }[tls]
    return Dialer(address.host, address.port, ring, server_name, timeout_s, lowest, highest, trace)


def raise_file_limit(wanted: int) -> None:
    """Let this process and its children open so many files. Raises DeviceError when the system does not allow it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    if hard < wanted:
        raise DeviceError(
            f"{wanted} open files are needed and {hard} allowed: run `ulimit -n {wanted}` as root, or set LimitNOFILE="
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_line() -> str:
    """The first line of stdin, byte by byte: what stands behind it is somebody else's, and not for a buffer here."""
    try:
        descriptor = sys.stdin.fileno()
    except OSError:  # stdin is no file: a test's
        return sys.stdin.readline()
    line = b""
    while len(line) < TEXT_BYTES_MAX and (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode("utf-8", "replace")


def _read_key(key_file: str | None) -> "Key":
    from gateway.device.keyring import read_key_file
    from gateway.registry.identities import parse_key_hex

    if key_file is not None and key_file != "-":
        return read_key_file(Path(key_file))
    if key_file == "-":
        return parse_key_hex(read_line())
    if text := os.environ.get("PSKGW_KEY"):
        return parse_key_hex(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return parse_key_hex(getpass.getpass("Key (hex): "))
        except getpass.GetPassWarning:
            raise ConfigurationError(
                "there is no terminal to ask for the key: give --key-file FILE, or set PSKGW_KEY"
            ) from None
