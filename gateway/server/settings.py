"""The settings of one node: its processes, its limits and its listeners.

Only what works is accepted. A key of a later version is refused like any unknown key, so that no setting is
ever silently without effect.
"""

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationInfo,
)

from gateway.net.address import address_text
from gateway.server.networks import Networks

__all__ = [
    "Address",
    "BindAddress",
    "FolderPath",
    "ListenerSettings",
    "NodeSettings",
    "Settings",
]

PORT_MAX = 0xFFFF
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name, IPv4 or IPv6 without brackets) and a TCP port. Port 0 asks the kernel for a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `host:port` or `[v6]:port`; raises ValueError with what to write instead."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError(f"{text!r} has no port, write host:port, for example 0.0.0.0:8883")
        if not (port.isascii() and port.isdecimal() and int(port) <= PORT_MAX):
            raise ValueError(
                f"{port!r} is not a port, write a number from 0 to {PORT_MAX} after the last colon"
            )
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            _require_ipv6(host)
        elif ":" in host:
            raise ValueError(f"an IPv6 address stands in brackets, write [{host}]:{port}")
        if not host:
            raise ValueError(
                f"the host is missing, write 0.0.0.0:{port} for every IPv4 address or [::]:{port}"
            )
        if any(character.isspace() or character in "/[]" for character in host):
            raise ValueError(f"{host!r} is not a host name or address")
        return cls(host, int(port))

    def __str__(self) -> str:
        return address_text(self.host, self.port)


def _require_ipv6(host: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(f"{host!r} in brackets is not an IPv6 address") from None


def _address(value: object) -> Address:
    if isinstance(value, Address):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a text as host:port")  # noqa: TRY004 -- pydantic reports ValueError, not TypeError
    return Address.parse(value)


BindAddress = Annotated[Address, PlainValidator(_address), PlainSerializer(str, return_type=str)]
"""`host:port` in the file, an Address in the program."""

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", strict=True)
]
"""A name that stands in log lines, metric labels and environment variables."""

RealmName = Annotated[str, StringConstraints(min_length=1, max_length=64)]


def _server_name(value: str) -> str:
    # RFC 6066 section 3: a DNS host name without a trailing dot, compared without regard to case.
    name = value.lower()
    if not name or name.endswith(".") or not name.isascii() or any(character.isspace() for character in name):
        raise ValueError(f"{value!r} is not a server name: write an ASCII host name without a trailing dot")
    return name


ServerName = Annotated[str, AfterValidator(_server_name)]


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    base = info.context.get("base", ".") if isinstance(info.context, dict) else "."
    return (Path(base) / path).absolute()


FolderPath = Annotated[Path, AfterValidator(_resolve_path)]
"""A path that is relative to the folder of gateway.toml, `base` in the context of validation."""


class Settings(BaseModel):
    """What all settings of a node share: they never change, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class NodeSettings(Settings):
    """`[node]`: the machine's view of the gateway."""

    name: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        max_length=255,
        description="Name of this node in its log, and the host that `add-device` tells a device whose listener is bound to "
        "every address. Default: the host name.",
    )
    workers: Annotated[
        int,
        Field(
            ge=0,
            le=256,
            description="Worker processes; 0 means one per core. One is the easiest to watch and serves thousands "
            "of devices.",
        ),
    ] = 1
    data_dir: Annotated[
        FolderPath,
        Field(
            description="Folder of the replica, the control socket and the spools. While the gateway is stopped `replica` "
            "may be deleted, it is copied anew; `spool` may not: it holds messages that were acknowledged."
        ),
    ] = Path("data")
    drain_s: Annotated[
        float,
        Field(
            ge=0,
            le=HOUR_S,
            allow_inf_nan=False,
            description="Seconds that live sessions have to end after SIGTERM. Ten fit into the 90 s that systemd "
            "and the 30 s that Kubernetes wait before they kill.",
        ),
    ] = 10.0


Profile = Literal["modern", "compatible", "constrained"]


class ListenerSettings(Settings):
    """`[[listeners]]`: one address that devices connect to."""

    name: Annotated[Name, Field(description="Name of the listener, the label `listener` of its metrics.")]
    bind: Annotated[
        BindAddress,
        Field(description="Address to listen on, as host:port or [v6]:port. Port 0 takes a free one."),
    ]
    realm: Annotated[
        RealmName, Field(description="Realm of the devices that send no server name, or one not listed.")
    ] = "default"
    profile: Annotated[
        Profile,
        Field(
            description="Cipher suites on offer. `modern`: only with forward secrecy. `compatible`: also plain PSK, "
            "which is all that many small devices have, and last AES-CBC. `constrained`: also PSK-AES128-CCM8, "
            "which RFC 7925 asks devices for; its tags have 64 bits."
        ),
    ] = "compatible"
    realms_by_sni: dict[ServerName, RealmName] = Field(
        default_factory=dict, description="Realm by the server name (SNI) that a device sends."
    )
    proxy_protocol_from: Networks = Field(
        default=(),
        description="Networks of the balancers in front of this listener, in CIDR notation. A connection from one of "
        "them must begin with a PROXY header, version 1 or 2; the address that it names is the device's from then on.",
    )
    allow_dhe_psk: Annotated[
        bool,
        Field(
            description="Take finite-field DHE-PSK suites too, from devices that offer nothing better. RFC 10015 "
            "forbids them, and each such handshake costs 18 times the CPU of a plain one, half of it before the "
            "device is known: only for a fleet that has nothing else."
        ),
    ] = False
