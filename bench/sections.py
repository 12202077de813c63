"""What the report says about each case: its text, the columns of its table, and its chart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from bench.cases.handshake import MANY_LINES
from bench.cases.pump import PUMP
from bench.messages import SUBSCRIBED
from bench.node import GATEWAY
from bench.peers import MOSQUITTO, STUNNEL

__all__ = ["SECTIONS", "Section"]


@dataclass(frozen=True, slots=True)
class Section:
    """One case in the report."""

    title: str
    text: str
    at: str
    """What `Series.at` counts"""
    charted: tuple[str, ...]
    """Figures, a panel each; ratios are taken of them, too"""
    peers: tuple[str, ...] = ()
    """Ratios to these"""
    chart: Literal["bars", "growth"] = "bars"
    log: bool = False
    """`at` grows by factors"""


SECTIONS: Final[Mapping[str, Section]] = {
    "handshake": Section(
        "Connect + handshake + close",
        "The gateway as `gatewayctl init` configures it: one worker, metrics, limits, log and follower switched on, its registry in "
        "SQLite with 1,000,000 devices (10,000 in a quick run), which come in scattered order, each for the first time in a full run. Mosquitto: a psk_file of 1,000 or "
        "100,000 lines, errors logged only, no MQTT after the handshake. Both send a PSK identity hint. CPU is per connection, latency "
        "from connect to the end of the handshake. The load generator waits awake on its own core: asleep, it would be woken by nearly every "
        "write of a server slower than itself, some 10 us each, which a device on another machine does not cost. The last row "
        "is the gateway alone, on a route to a file: the line is acknowledged when its batch is on the disk (fsync).",
        "clients",
        ("cpu_us",),
        (MOSQUITTO, MANY_LINES),
    ),
    "pump": Section(
        "A handshake without a gateway",
        "How near to Mosquitto anything can come that stands on pyOpenSSL and this event loop: bench/pump.py takes the gateway's own parts for "
        "sockets and TLS and the key of every identity from a hash. It has no scan of the hello, look-up, limits, deadlines, metrics, log, routes "
        "nor sessions. The gateway is as above, with a registry of 10,000.",
        "clients",
        ("cpu_us",),
        (MOSQUITTO,),
    ),
    "stream": Section(
        "Through a stream route, beside stunnel",
        "Connections with one round trip of 64 bytes each; round trips of 100 bytes on 50 open connections; and 16 KiB writes on one connection "
        "(up to 1 MiB on the way; latency is from a write to the end of its echo). stunnel is in server mode with a file of 1,000 keys, errors logged "
        "only, without resumption. Both connect to the same echo service (bench/echo.c), which shares the load generator's core, so the "
        "generator sleeps while it waits.",
        "clients",
        ("cpu_us", "trip_us", "gb_s"),
        (STUNNEL,),
    ),
    "memory": Section(
        "Memory of idle sessions",
        "TLS 1.2 PSK-AES128-GCM-SHA256, fresh servers. Per session, without file pages (libraries, the replica: they are shared and do not "
        "grow with sessions), and with them. 64 KB both ways are 8,192 lines of 8 bytes and as many acknowledgements on the framed route, as many MQTT messages "
        "of QoS 1 for Mosquitto (16 on the way each), and 64 KiB in one go, echoed, through stream route and stunnel. What all "
        "sessions together leave behind, such as heaps of messages that were on their way, counts. Without sessions: pages that several "
        "processes use are counted once.",
        "sessions",
        ("session_kib",),
    ),
    "messages": Section(
        "Messages on open sessions",
        "100 bytes and 1 KB over TLS 1.2 PSK-AES128-GCM-SHA256, acknowledged, 200 messages of each connection unanswered at a time. CPU is until "
        "the last one is delivered (written to the file, answered by the HTTP server, with the subscriber). The gateway has a listener, route and "
        'backend for each row in one process, everything as shipped: spools with `sync = "full"`, files with `fsync = "batch"`. Mosquitto: QoS 1, '
        "`persistence true`, which dumps what it holds every half hour and when it ends, so what it acknowledges is in its memory alone; the "
        "subscriber has QoS 1 over PSK, on the generator's core. Ratios are to Mosquitto with one subscriber. "
        "Latencies are from the moment a message was due to its acknowledgement, at half the messages per second that each took just "
        "before; with a slow fsync every fsync and fdatasync takes 20 ms more (bench/slow_fsync.c).",
        "clients",
        ("message_us",),
        (SUBSCRIBED,),
    ),
    "changes": Section(
        "How soon a change is felt",
        "From the commit of a revocation until the device's session is closed, and from that of a new device until its first accepted handshake (it "
        "tries every few milliseconds, so `limits.penalty_max_s` is 0 here). Registry of 10,000 in SQLite; every time includes the start or end of a program of the benchmark.",
        "devices",
        ("felt_s",),
    ),
    "growth-registry": Section(
        "Cost of a handshake by the size of the registry",
        "TLS 1.2 PSK-AES128-GCM-SHA256, 64 clients, a gateway for each size, in turns.",
        "devices in the registry",
        ("cpu_us",),
        chart="growth",
        log=True,
    ),
    "growth-sessions": Section(
        "Cost of a handshake and memory by open sessions",
        "TLS 1.2 PSK-AES128-GCM-SHA256, 64 clients that come and go while so many other sessions of a framed route are open in the one worker; each of them has "
        "sent a line. Memory is of all processes, without file pages, before the comers; the server of each round is a fresh one.",
        "open sessions",
        ("cpu_us", "memory_mib"),
        chart="growth",
    ),
    "growth-workers": Section(
        "Cost of a handshake by workers",
        "TLS 1.2 PSK-AES128-GCM-SHA256, 64 clients. The workers share the servers' cores: this is what a second worker costs, not how much more "
        "two of them take on two cores.",
        "workers",
        ("cpu_us",),
        chart="growth",
    ),
    "growth-restart": Section(
        "Time to bring a fleet back after a restart",
        "From the start of the program, on all cores, until it is ready, with the replica from before, and from there until all devices have a session; up to "
        "1,000 of them try at a time, without back-off. One worker.",
        "devices",
        ("whole_s", "ready_s"),
        chart="growth",
    ),
    "import": Section(
        "Import",
        "`gatewayctl import-devices` of a psk_file into an empty registry in SQLite; all of its process.",
        "devices",
        ("import_s", "cpu_s"),
        chart="growth",
    ),
    "import-followed": Section(
        "Import into a database elsewhere, with a gateway that follows",
        "`python -m bench.imports --registry URL`.",
        "devices",
        ("import_s",),
    ),
}

SERVER_COLOURS: Final = {
    GATEWAY: "#1f5fa8",
    MOSQUITTO: "#d98c1f",
    MANY_LINES: "#a8541f",
    PUMP: "#7a5ea8",
    STUNNEL: "#3d8f52",
}
