"""A fleet in one process: many devices on one event loop, each a link and a timer.

A device connects when its turn comes, at the arrival rate or as fast as `connecting_max` allows (a storm), sends messages
at its own random times, and counts what comes back. A session that ends is begun anew, at once when the device ended it
(churn), else after a back-off. Bad actors run beside them and are expected to be turned away; one that gets in is counted.

There is a task per device only while it connects.
"""

import asyncio
import collections
import random
import resource
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec

from gateway.device.backoff import BackOff
from gateway.device.fleet_report import FleetReport
from gateway.device.keyring import KeyRing
from gateway.device.link import Dialer, Link
from gateway.errors import DeviceError
from gateway.registry.sealing import Key
from gateway.tls.openssl import TlsVersion
from gateway.tls.session import ClientSession

__all__ = ["Fleet", "FleetPlan"]

SETTLE_S: Final = 10.0
"""How long answers are waited for at the end."""
BAD_PAUSE_S: Final = 1.0
"""Between two tries of a bad actor, and between two bytes of a slow one."""
_PAYLOAD_BYTES_MAX: Final = 1024 * 1024

Spread = Literal["fixed", "uniform", "exponential"]


class FleetPlan(msgspec.Struct, frozen=True):
    """What one process is to simulate. Rates and counts are its own share."""

    host: str
    port: int
    devices: tuple[tuple[str, str], ...]
    """identity and key in hex"""
    server_name: str | None = None
    tls: str | None = None
    connect_timeout_s: float = 10.0
    arrivals_per_s: float = 0.0
    """0: a storm"""
    connecting_max: int = 128
    duration_s: float = 10.0
    interval_s: float = 1.0
    """Mean time between two messages of a device; 0: none are sent"""
    interval_spread: Spread = "exponential"
    size: int = 100
    """Mean bytes of a message"""
    size_spread: Spread = "fixed"
    session_s: float = 0.0
    """Mean length of a session before the device ends it (exponential); 0: it stays"""
    bad: dict[str, int] = msgspec.field(default_factory=dict)
    """Bad actors by kind: wrong-key, unknown, slow, silent"""
    report_every_s: float = 1.0


class Fleet:
    """Runs a plan once."""

    def __init__(self, plan: FleetPlan) -> None:
        self.plan = plan
        self.report = FleetReport(devices=len(plan.devices))
        lowest, highest = {
            None: (TlsVersion.TLS1_2, TlsVersion.TLS1_3),
            "1.2": (TlsVersion.TLS1_2, TlsVersion.TLS1_2),
            "1.3": (TlsVersion.TLS1_3, TlsVersion.TLS1_3),
        }[plan.tls]
        nobody = KeyRing.of("nobody", Key.generate())
        self.dialer = Dialer(
            plan.host, plan.port, nobody, plan.server_name, plan.connect_timeout_s, lowest, highest
        )
        self.loop = asyncio.get_running_loop()
        self.stopping = False
        self._devices = [
            SimulatedDevice(self, KeyRing.of(identity, Key(bytes.fromhex(key))))
            for identity, key in plan.devices
        ]
        self._due: collections.deque[SimulatedDevice] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connecting = 0

    async def run(self) -> None:
        """Let them come, go on for `duration_s`, wait for the last answers, and leave in an orderly way."""
        bad = [
            self._own(_bad_actor(self, kind, number))
            for kind, count in self.plan.bad.items()
            for number in range(count)
        ]
        arriving = self._own(self._arrive())
        await asyncio.sleep(self.plan.duration_s)
        self.stopping = True
        arriving.cancel()
        for task in bad:
            task.cancel()
        for device in self._devices:
            device.rest()
        give_up_at = self.loop.time() + SETTLE_S
        while self.loop.time() < give_up_at and any(device.awaited for device in self._devices):  # noqa: ASYNC110 - a sum over the fleet
            await asyncio.sleep(0.05)
        self.snapshot()
        for device in self._devices:
            device.leave()
        while self._tasks or (self.report.sessions and self.loop.time() < give_up_at + SETTLE_S):
            for task in self._tasks:
                task.cancel()
            await asyncio.sleep(0.05)

    def snapshot(self) -> FleetReport:
        """The report as it stands, with what the process used."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        report = self.report
        report.cpu_s = usage.ru_utime + usage.ru_stime
        if not self.stopping:
            report.sessions_max = max(report.sessions_max, report.sessions)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        report.memory_bytes = pages * resource.getpagesize()
        return report

    def come_again(self, device: "SimulatedDevice", after_s: float) -> None:
        """Connect a device later, or when there is room."""
        if self.stopping:
            return
        if after_s:
            self.loop.call_later(after_s, self.come_again, device, 0.0)
        else:
            self._due.append(device)
            self._connect_due()

    def failed(self, error: DeviceError) -> None:
        """A handshake of a good device failed."""
        reason = str(error).replace(self.dialer.where, "the gateway")
        self.report.handshakes_failed[reason] = self.report.handshakes_failed.get(reason, 0) + 1

    async def _arrive(self) -> None:
        rate = self.plan.arrivals_per_s
        started = self.loop.time()
        for number, device in enumerate(self._devices):
            if rate:
                wait_s = started + number / rate - self.loop.time()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
            self.come_again(device, 0.0)

    def _connect_due(self) -> None:
        while self._due and self._connecting < self.plan.connecting_max and not self.stopping:
            self._connecting += 1
            self._own(self._connect(self._due.popleft()))

    async def _connect(self, device: "SimulatedDevice") -> None:
        try:
            await device.connect()
        finally:
            self._connecting -= 1
            if self._due:
                self.loop.call_soon(self._connect_due)

    def _own(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class SimulatedDevice:
    """One device of the fleet: the owner of its links."""

    __slots__ = (
        "_back_off",
        "_fleet",
        "_is_ending",
        "_link",
        "_rest",
        "_ring",
        "_slow",
        "_started",
        "_timers",
        "awaited",
    )

    def __init__(self, fleet: Fleet, ring: KeyRing) -> None:
        self._fleet = fleet
        self._ring = ring
        self._link: Link | None = None
        self._back_off = BackOff(0.5, 30)
        self._started = 0.0
        self._rest = b""
        self._slow = False
        self._is_ending = False
        self._timers: list[asyncio.TimerHandle] = []
        self.awaited: collections.deque[float] = collections.deque()
        """When the messages without an answer were sent."""

    async def connect(self) -> None:
        """Open a link; a failure is counted and tried again."""
        self._started = time.perf_counter()
        try:
            await self._fleet.dialer.connect(self, self._ring)
        except DeviceError as exc:
            if not self._fleet.stopping:
                self._fleet.failed(exc)
                self._fleet.come_again(self, self._back_off.next())

    def rest(self) -> None:
        """Send no more."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def leave(self) -> None:
        """End the session."""
        self._fleet.report.unanswered += len(self.awaited)
        self.awaited.clear()
        if self._link is not None:
            self._is_ending = True
            self._link.finish()

    # From the link

    def link_opened(self, link: Link) -> None:
        """Begin to send."""
        fleet, plan = self._fleet, self._fleet.plan
        report = fleet.report
        report.handshake.observe(time.perf_counter() - self._started)
        report.handshakes += 1
        report.sessions += 1
        self._link = link
        self._rest = b""
        self._slow = self._is_ending = False
        self._back_off.reset()
        if fleet.stopping:
            self.leave()
            return
        if plan.interval_s:
            self._timers = [fleet.loop.call_later(_drawn(plan.interval_s, "uniform"), self._send)]
        if plan.session_s:
            self._timers.append(fleet.loop.call_later(_drawn(plan.session_s, "exponential"), self._end))

    def link_received(self, data: bytes) -> None:
        """Count answers."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        report = self._fleet.report
        now = time.perf_counter()
        for line in lines:
            word, _, rest = line.partition(b" ")
            if word == b"command" or not self.awaited:
                continue
            report.answer.observe(now - self.awaited.popleft())
            if word == b"error":
                reason = rest.partition(b" ")[2].decode("ascii", "replace")
                report.refused[reason] = report.refused.get(reason, 0) + 1
            else:
                report.acknowledged += 1

    def link_finished(self) -> None:
        """The gateway has said all."""
        if self._link is not None:
            self._link.close()

    def link_lost(self, error: DeviceError | None) -> None:  # noqa: ARG002 - either way a new one is opened
        """Count it and come again."""
        report = self._fleet.report
        report.sessions -= 1
        report.unanswered += len(self.awaited)
        self.awaited.clear()
        self._link = None
        self.rest()
        if self._is_ending:
            report.sessions_ended += 1
            self._fleet.come_again(self, 0.0)
        else:
            report.sessions_cut += 1
            self._fleet.come_again(self, self._back_off.next())

    def pause_sending(self) -> None:
        """The gateway does not read."""
        self._slow = True

    def resume_sending(self) -> None:
        """It reads again."""
        self._slow = False

    # From its timers

    def _send(self) -> None:
        fleet, plan = self._fleet, self._fleet.plan
        link = self._link
        if link is None or not link.is_open:
            return
        if self._slow:
            fleet.report.held_back += 1
        else:
            size = max(2, min(int(_drawn(plan.size, plan.size_spread)), _PAYLOAD_BYTES_MAX))
            self.awaited.append(time.perf_counter())
            link.send(b'"' + _LETTERS[: size - 2] + b'"\n')  # text, and JSON as well
            fleet.report.messages += 1
            fleet.report.message_bytes += size
        self._timers[0] = fleet.loop.call_later(_drawn(plan.interval_s, plan.interval_spread), self._send)

    def _end(self) -> None:
        self.rest()
        if self._link is not None:
            self._is_ending = True
            self._link.finish()


_LETTERS: Final = b"x" * _PAYLOAD_BYTES_MAX


def _drawn(mean: float, spread: Spread) -> float:
    """A random value with this mean."""
    if spread == "fixed":
        return mean
    if spread == "uniform":
        return random.uniform(0, 2 * mean)  # noqa: S311 - load, no secret
    return random.expovariate(1 / mean)


async def _bad_actor(fleet: Fleet, kind: str, number: int) -> None:
    """Try again and again."""
    while True:
        admitted = await (
            _try_raw(fleet, kind) if kind in ("slow", "silent") else _try_key(fleet, kind, number)
        )
        report = fleet.report
        if admitted:
            report.bad_admitted += 1
        else:
            report.bad[kind] = report.bad.get(kind, 0) + 1
        await asyncio.sleep(_drawn(BAD_PAUSE_S, "uniform"))


async def _try_key(fleet: Fleet, kind: str, number: int) -> bool:
    """Offer a key that is nobody's, for an identity that is somebody's or nobody's."""
    devices = fleet.plan.devices
    known = kind == "wrong-key" and devices
    identity = devices[number % len(devices)][0] if known else f"simulated-unknown-{number}"
    owner = _Intruder()
    try:
        link = await fleet.dialer.connect(owner, KeyRing.of(identity, Key.generate()))
    except DeviceError:
        return False
    link.abort()
    return True


async def _try_raw(fleet: Fleet, kind: str) -> bool:
    """Connect and say nothing, or a hello one byte at a time, until the gateway has enough."""
    try:
        _, protocol = await fleet.loop.create_connection(_Trickle, fleet.plan.host, fleet.plan.port)
    except OSError:
        return False
    session = ClientSession(fleet.dialer.context, lambda _hint: (b"nobody", bytes(32), "sha256"))
    hello = session.output()
    session.free()
    try:
        for byte in hello if kind == "slow" else b"":
            if protocol.gone.is_set():
                break
            protocol.transport.write(bytes([byte]))
            await asyncio.sleep(BAD_PAUSE_S)
        await protocol.gone.wait()
    finally:
        protocol.transport.abort()
    return False


class _Trickle(asyncio.Protocol):
    """A connection without TLS."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - any end is an end
        """The gateway had enough."""
        self.gone.set()


class _Intruder:
    """The owner of a link that should never open."""

    def link_opened(self, link: Link) -> None:
        """It did."""

    def link_received(self, data: bytes) -> None:
        """Nothing is wanted."""

    def link_finished(self) -> None:
        """Nothing is kept."""

    def link_lost(self, error: DeviceError | None) -> None:
        """Nothing is lost."""

    def pause_sending(self) -> None:
        """Nothing is sent."""

    def resume_sending(self) -> None:
        """Nothing is sent."""
