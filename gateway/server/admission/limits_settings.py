"""The bounds of one node: connections, handshakes, sessions. What each one does: docs/limits.md."""

from typing import Annotated

from pydantic import Field

from gateway.server.networks import Networks
from gateway.server.settings import HOUR_S, Settings

__all__ = ["LimitsSettings"]


class LimitsSettings(Settings):
    """`[limits]`: bounds of one node, shared by its workers."""

    connections: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Open connections, handshaking ones included. 20,000 idle sessions hold about half a "
            "gigabyte, and a stream session takes two file descriptors.",
        ),
    ] = 20_000
    connections_per_address: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Open connections from one address. A whole site stands behind one NAT address, so thousands "
            "are normal; half of the default of `connections` keeps one address from taking everything.",
        ),
    ] = 10_000
    connections_per_network: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Open connections from one network, an IPv4 /24 or an IPv6 /64. Who rents one of these has all its "
            "addresses; a quarter of the default of `connections` is left for everybody else.",
        ),
    ] = 15_000
    connections_per_address_per_s: Annotated[
        float,
        Field(
            ge=0,
            le=1_000_000,
            allow_inf_nan=False,
            description="New connections a second from one address, ten seconds' worth of them at once; 0 is any number. "
            "Devices behind one NAT address come back together after an outage, so a bound must fit the site.",
        ),
    ] = 0.0
    connections_per_network_per_s: Annotated[
        float,
        Field(
            ge=0,
            le=1_000_000,
            allow_inf_nan=False,
            description="The same for one network, an IPv4 /24 or an IPv6 /64.",
        ),
    ] = 0.0
    failures_per_address_per_s: Annotated[
        float,
        Field(
            gt=0,
            le=1_000_000,
            allow_inf_nan=False,
            description="Failed handshakes a second from one address, twenty seconds' worth of them at once, that are "
            "counted by their cause and logged one by one. More are `rate_limited` and logged in sum; a right key is "
            "let in all the same.",
        ),
    ] = 50.0
    failures_per_network_per_s: Annotated[
        float,
        Field(
            gt=0,
            le=1_000_000,
            allow_inf_nan=False,
            description="The same for one network, an IPv4 /24 or an IPv6 /64.",
        ),
    ] = 200.0
    penalty_max_s: Annotated[
        float,
        Field(
            ge=0,
            le=10,
            allow_inf_nan=False,
            description="Longest time that the alert is held back from an identity that fails again and again from one "
            "address: from the sixth failure on a quarter of a second, then each time twice as long. 0: no penalty. "
            "Only failures wait, so a right key is never late.",
        ),
    ] = 1.0
    refused_networks: Networks = Field(
        default=(), description="Networks whose connections are closed at once, in CIDR notation."
    )
    exempt_networks: Networks = Field(
        default=(),
        description="Networks that only `connections` and `handshakes_in_flight` count for: own sites, probes.",
    )
    handshakes_in_flight: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="Handshakes between the complete ClientHello and the end. 2,000 at a round trip of 200 ms are "
            "10,000 handshakes a second, about what one core computes; each holds up to 60 KB meanwhile. One more "
            "ends the oldest, which is the likeliest to be waited for in vain.",
        ),
    ] = 2_000
    handshake_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=HOUR_S,
            allow_inf_nan=False,
            description="Seconds from the accepted connection to the finished handshake. Ten let a device on a bad "
            "radio link repeat a lost packet three times.",
        ),
    ] = 10.0
    proxy_header_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=HOUR_S,
            allow_inf_nan=False,
            description="Seconds that a balancer of `proxy_protocol_from` has for its PROXY header. It stands near and "
            "says the header at once.",
        ),
    ] = 3.0
    first_message_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=24 * HOUR_S,
            allow_inf_nan=False,
            description="Seconds from the finished handshake to the first byte of the device, on framed routes.",
        ),
    ] = 60.0
    idle_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=31 * 24 * HOUR_S,
            allow_inf_nan=False,
            description="Seconds without a byte in either direction after which a session is closed. An hour outlives "
            "the usual keep-alive and reporting intervals, and still frees what a lost device holds.",
        ),
    ] = HOUR_S
    message_bytes_max: Annotated[
        int,
        Field(
            ge=1,
            le=16 * 1024 * 1024,
            description="Largest payload of one message on a framed route, in bytes. A longer frame is refused with "
            "`too_long`. 64 KiB is far above what devices of this kind hold in memory.",
        ),
    ] = 65_536
    sessions_per_device: Annotated[
        int,
        Field(
            ge=0,
            le=1_000,
            description="Live sessions of one device on this node; one more ends the oldest. 0 is any number. A realm may "
            "have its own. Devices behind bad links open a new session long before the old one is found dead.",
        ),
    ] = 0
