"""Stream routes: full duplex to a TCP service, with half-close, back-pressure and bounded memory."""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gateway.device.client import DeviceClient
from gateway.registry.store import NewDevice
from tests.support.devices import TLS12, TLS13, End, Fleet, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.memory import MemoryWatch
from tests.support.services import (
    Service,
    closes_at_once,
    deaf_port,
    digest_of,
    echo,
    ends_first,
    never_reads,
    pattern,
    pours,
    reads_slowly,
    replies_at_end,
    resets,
    speaks_first,
)

MIB = 1 << 20
GROWTH_BYTES_MAX = 4 * MIB
"""The bound of one stream: a read of 64 KiB as it came, decrypted and encrypted, 64 KiB waiting on either side, and
what the allocator keeps of all that."""
FLEET = 1_000
LOGIN_FILES = 1024
"""Open files that a login session or a service usually may have unless it asks for more."""
BULK_BYTES = 64 * MIB
PROVE_BYTES = 1 << 30
RATE = 64 * MIB
"""Bytes per second of what is slow: far below what the gateway does."""
GREETING = b"220 ready\r\n"
STALLED_S = 0.7
"""Without any progress for so long, back-pressure has reached the far end."""


@dataclasses.dataclass
class Stage:
    """A gateway with one stream route and one device for each service, named alike."""

    gateway: Gateway
    services: dict[str, Service]
    devices: dict[str, Device]
    port: int

    def connect(self, name: str, **settings: object) -> TlsDevice:
        return TlsDevice.connect(self.port, self.devices[name], **settings)

    def service(self, name: str) -> Service:
        """The service, without the connections of earlier tests."""
        service = self.services[name]
        service.peers.clear()
        return service

    def watch(self) -> MemoryWatch:
        return MemoryWatch(self.gateway.worker_pids())


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    behaviours = {
        "echo": echo,
        "slow": reads_slowly(RATE),
        "never": never_reads,
        "greeting": speaks_first(GREETING),
        "pour": pours(BULK_BYTES),
        "torrent": pours(PROVE_BYTES),
        "reply": replies_at_end(3 * MIB),
        "farewell": ends_first(GREETING),
        "reset": resets,
        "close": closes_at_once,
        "absent": echo,
        "restarted": echo,
    }
    with contextlib.ExitStack() as stack:
        services = {
            name: stack.enter_context(Service(behaviour, listen=name not in ("absent", "restarted")))
            for name, behaviour in behaviours.items()
        }
        urls = {name: service.url for name, service in services.items()}
        urls["deaf"] = f"tcp://127.0.0.1:{stack.enter_context(deaf_port())}"
        if request.param == "asyncio":  # and by name: a numeric address needs no resolver, and so no task
            urls = {name: url.replace("127.0.0.1", "localhost") for name, url in urls.items()}
        waits_s = {"absent": 1, "deaf": 1}
        gateway = new_gateway(
            tmp_path_factory.mktemp("streams") / "gateway",
            routes="".join(
                f'[[routes]]\nname = "{name}"\nmatch = {{ group = "{name}" }}\n'
                f'framing = "stream"\nbackend = "{name}"\n'
                for name in urls
            ),
            backends="".join(
                f'[backends.{name}]\nkind = "tcp"\nurl = "{url}"\nconnect_timeout_s = {waits_s.get(name, 15)}\n'
                for name, url in urls.items()
            ),
            asyncio_only=request.param == "asyncio",
        )
        added = gateway.add_devices(*(NewDevice(identity=name, group=name) for name in urls))
        devices = {device.identity: device for device in added}
        _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (LOGIN_FILES, files_max))  # which the gateway inherits
        stack.enter_context(running(gateway))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
        yield Stage(gateway, services, devices, gateway.port())
        assert gateway.stop() == 0
        assert gateway.complaints() == []


@pytest.fixture(params=[TLS12, TLS13], ids=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> object:
    return request.param


# Back-pressure: first, while the worker is small


@pytest.mark.parametrize("size", [BULK_BYTES, pytest.param(PROVE_BYTES, marks=pytest.mark.prove)])
def test_a_slow_service_slows_its_device_down(
    stage: Stage, size: int, measured: Callable[[str], None]
) -> None:
    service = stage.service("slow")
    with stage.watch() as watch, stage.connect("slow", timeout_s=size / RATE + 20) as device:
        for piece in pattern(size):
            device.send(piece)
        device.finish()
        assert device.receive_to_end() == b""
        assert device.end is End.NOTIFIED
    assert (service.peer.received_bytes, service.peer.received_digest) == (size, digest_of(size))
    _check_growth(watch, f"{size / MIB:.0f} MiB to a slow service", measured)


def test_a_service_that_never_reads_stops_its_device(stage: Stage, measured: Callable[[str], None]) -> None:
    service = stage.service("never")
    with stage.watch() as watch, stage.connect("never") as device:
        sent = _send_until_stalled(device)
        with stage.connect("echo") as other:
            other.echo(b"not held up")
        _check_growth(watch, f"{sent / MIB:.1f} MiB to a service that never reads", measured)
    # The device is gone; what it sent is still the service's.
    service.release()
    wait_for(lambda: service.peer.ended or service.peer.failed, what="the service sees the end")
    assert 0 < service.peer.received_bytes <= sent


def test_a_service_that_reads_late_gets_everything(stage: Stage) -> None:
    size = 24 * MIB
    service = stage.service("never")
    with stage.connect("never") as device:
        pieces = pattern(size)

        def send() -> None:
            for piece in pieces:
                device.send(piece)
            device.finish()

        sender = threading.Thread(target=send)
        sender.start()
        stalled = _wait_until_stalled(lambda: int(stage.gateway.metric("pskgw_received_bytes_total")))
        assert sender.is_alive(), f"{stalled} bytes went nowhere"
        service.release()
        sender.join(20)
        assert not sender.is_alive()
        wait_for(lambda: service.peer.ended, what="the end at the service")
    assert service.peer.received_digest == digest_of(size)


@pytest.mark.parametrize(
    ("name", "size"),
    [("pour", BULK_BYTES), pytest.param("torrent", PROVE_BYTES, marks=pytest.mark.prove)],
)
def test_a_slow_device_slows_its_service_down(
    stage: Stage, name: str, size: int, measured: Callable[[str], None]
) -> None:
    received = hashlib.sha256()
    count = 0
    with stage.watch() as watch, stage.connect(name, receive_buffer_bytes=65536) as device:
        began = time.monotonic()
        while data := device.receive():
            received.update(data)
            count += len(data)
            time.sleep(max(0.0, began + count / RATE - time.monotonic()))
        assert device.end is End.NOTIFIED
    assert (count, received.hexdigest()) == (size, digest_of(size))
    _check_growth(watch, f"{size / MIB:.0f} MiB to a slow device", measured)


def test_a_device_that_never_reads_stops_its_service(stage: Stage, measured: Callable[[str], None]) -> None:
    service = stage.service("pour")
    with stage.watch() as watch, stage.connect("pour", receive_buffer_bytes=65536) as device:
        sent = _wait_until_stalled(lambda: service.peer.sent_bytes)
        assert sent < BULK_BYTES
        with stage.connect("echo") as other:
            other.echo(b"not held up")
        _check_growth(watch, f"{sent / MIB:.1f} MiB to a device that never reads", measured)
        received = hashlib.sha256()
        while data := device.receive():
            received.update(data)
    assert received.hexdigest() == digest_of(BULK_BYTES)


def test_a_device_that_vanishes_without_reading_lets_its_service_go(stage: Stage) -> None:
    service = stage.service("pour")
    device = stage.connect("pour", receive_buffer_bytes=65536)
    _wait_until_stalled(lambda: service.peer.sent_bytes)
    device.reset()
    wait_for(service.peer.done.is_set, what="the service's connection closed")


# Full duplex


def test_both_directions_flow_at_the_same_time(stage: Stage) -> None:
    size = 8 * MIB
    service = stage.service("echo")

    async def send(client: DeviceClient) -> None:
        for piece in pattern(size):
            await client.send(piece)
        await client.finish()

    async def play() -> str:
        client = await Fleet(stage.port, ()).connect_one(stage.devices["echo"])
        received = hashlib.sha256()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(client))
            while data := await client.receive():
                received.update(data)
        await client.close()
        return received.hexdigest()

    assert asyncio.run(play()) == digest_of(size)
    assert service.peer.received_digest == digest_of(size)


def test_bytes_are_counted(stage: Stage) -> None:
    counted = ("pskgw_received_bytes_total", "pskgw_sent_bytes_total")
    before = [stage.gateway.metric(name, route="echo") for name in counted]
    with stage.connect("echo") as device:
        device.echo(bytes(12_345))
    assert [stage.gateway.metric(name, route="echo") for name in counted] == [n + 12_345 for n in before]


# Ends


def test_a_device_may_end_first_and_still_get_the_reply(stage: Stage, version: object) -> None:
    service = stage.service("reply")
    with stage.connect("reply", version=version) as device:
        for piece in pattern(2 * MIB):
            device.send(piece)
        device.finish()
        reply = device.receive_to_end()
        assert device.end is End.NOTIFIED
    assert hashlib.sha256(reply).hexdigest() == digest_of(3 * MIB)
    assert service.peer.received_digest == digest_of(2 * MIB)


def test_a_service_may_end_first_and_still_get_the_rest(stage: Stage, version: object) -> None:
    service = stage.service("farewell")
    with stage.connect("farewell", version=version) as device:
        assert device.receive_to_end() == GREETING
        assert device.end is End.NOTIFIED
        for piece in pattern(2 * MIB):
            device.send(piece)
        device.finish()
        wait_for(service.peer.done.is_set, what="the end at the service")
    assert service.peer.ended
    assert service.peer.received_digest == digest_of(2 * MIB)


def test_a_bare_fin_ends_the_direction_of_the_device(stage: Stage) -> None:
    service = stage.service("echo")
    with stage.connect("echo") as device:
        device.send(b"last words")
        device.sock.shutdown(1)
        assert device.receive_to_end() == b"last words"
        assert device.end is End.NOTIFIED
    assert service.peer.ended


def test_the_service_may_speak_first(stage: Stage, version: object) -> None:
    with stage.connect("greeting", version=version) as device:
        assert device.receive_exactly(len(GREETING)) == GREETING
        device.echo(b"EHLO")


def test_what_a_device_sends_with_its_last_flight_arrives(stage: Stage) -> None:
    """In TLS 1.3 the client may send data, and its close, at once behind its Finished."""
    with TlsDevice(stage.port, stage.devices["echo"], version=TLS13) as device:
        device.transmit()
        while not device.version:
            device.take()
        device.session.send(b"early bird")
        device.session.close()
        device.transmit()
        assert device.receive_to_end() == b"early bird"
        assert device.end is End.NOTIFIED


def test_a_service_that_closes_at_once_ends_the_session_in_an_orderly_way(stage: Stage) -> None:
    with stage.connect("close") as device:
        assert device.receive_to_end() == b""
        assert device.end is End.NOTIFIED


def test_a_service_that_resets_ends_the_session_in_an_orderly_way(stage: Stage) -> None:
    with stage.connect("reset") as device:
        device.send(b"hello")
        assert device.receive_to_end() == b""
        assert device.end is End.NOTIFIED
    with stage.connect("echo") as other:
        other.echo(b"not disturbed")


def test_a_device_that_resets_ends_the_connection_of_its_service(stage: Stage) -> None:
    service = stage.service("echo")
    device = stage.connect("echo")
    device.echo(b"hello")
    device.reset()
    wait_for(service.peer.done.is_set, what="the end at the service")


# A service that is away


def test_a_service_that_does_not_answer_ends_the_session_in_time(stage: Stage) -> None:
    began = time.monotonic()
    with stage.connect("deaf") as device:
        device.send(b"is anybody there?")
        assert device.receive_to_end() == b""
        assert device.end is End.NOTIFIED
    assert 1 <= time.monotonic() - began < 3
    away = stage.gateway.wait_for_event("backend_away", backend="deaf")
    assert "does not answer" in away["reason"]
    assert stage.gateway.metric("pskgw_backend_duration_seconds_count", backend="deaf", outcome="error") >= 1


def test_a_service_that_comes_back_in_time_is_found(stage: Stage) -> None:
    with stage.connect("restarted") as device:
        device.send(b"patience")
        (session,) = stage.gateway.sessions()
        assert session["route"] == "restarted"
        stage.services["restarted"].start()
        assert device.receive_exactly(8) == b"patience"
    assert stage.gateway.events("backend_away") == [
        event for event in stage.gateway.events("backend_away") if event["backend"] != "restarted"
    ]


def test_a_service_that_stays_away_ends_sessions_in_an_orderly_way_and_is_logged_once(stage: Stage) -> None:
    for _ in range(5):
        with stage.connect("absent") as device:
            assert device.receive_to_end() == b""
            assert device.end is End.NOTIFIED
    assert len(_of_backend(stage, "backend_away", "absent")) == 1
    stage.services["absent"].start()
    wait_for(lambda: _echoes(stage, "absent"), what="the service found again")
    assert len(_of_backend(stage, "backend_away", "absent")) == 1
    assert len(_of_backend(stage, "backend_back", "absent")) == 1


# Many


def test_a_thousand_devices_at_once_echo_while_others_come_and_go(
    stage: Stage, measured: Callable[[str], None]
) -> None:
    numbers = range(FLEET)
    suffix = os.urandom(4).hex()
    devices = stage.gateway.add_devices(
        *(NewDevice(identity=f"fleet-{suffix}-{number}", group="echo") for number in numbers)
    )
    stage.gateway.wait_until_followed()
    (pid,) = stage.gateway.worker_pids()

    async def exchange(client: DeviceClient, data: bytes) -> None:
        received = b""
        await client.send(data)
        while len(received) < len(data):
            more = await client.receive()
            assert more, f"ended after {len(received)} bytes of {len(data)}"
            received += more
        assert received == data

    async def converse(number: int, client: DeviceClient) -> None:
        source = random.Random(number)
        for size_max in (1, 5_000, 60_000, 500, 20_000):
            await exchange(client, source.randbytes(source.randint(1, size_max)))

    async def come_and_go(fleet: Fleet, number: int, done: asyncio.Event) -> int:
        visits = 0
        while not done.is_set():
            client = await fleet.connect_one(devices[number])
            await exchange(client, b"visit %d" % visits)
            await client.close()
            visits += 1
        return visits

    async def play() -> tuple[float, float, int]:
        fleet = Fleet(stage.port, devices)
        began = time.monotonic()
        await fleet.connect()
        connected = time.monotonic()
        held = stage.gateway.metric("pskgw_connections", listener="tls")
        assert held == FLEET, f"{held} connections are open at once"
        done = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            visitors = [tasks.create_task(come_and_go(fleet, number, done)) for number in range(8)]
            await fleet.each(converse)
            done.set()
        exchanged = time.monotonic()
        await fleet.close()
        return connected - began, exchanged - connected, sum(visitor.result() for visitor in visitors)

    stage.service("echo")
    watch = MemoryWatch([pid])
    with watch:
        connect_s, exchange_s, visits = asyncio.run(play())
    assert visits >= 8
    wait_for(lambda: stage.gateway.metric("pskgw_connections") == 0, what="all connections gone")
    measured(
        f"{FLEET} devices connected in {connect_s:.2f} s, echoed in {exchange_s:.2f} s beside {visits} visits; "
        f"worker grew by {watch.growth_bytes / MIB:.1f} MiB"
    )


def _of_backend(stage: Stage, event: str, backend: str) -> list[object]:
    return [entry for entry in stage.gateway.events(event) if entry["backend"] == backend]


def _echoes(stage: Stage, name: str) -> bool:
    with stage.connect(name) as device:
        device.send(b"hello")
        return bool(device.receive())


def _send_until_stalled(device: TlsDevice) -> int:
    """Send until nothing goes any more; how many bytes went out or wait in this process's kernel buffer."""
    device.sock.settimeout(STALLED_S)
    sent = 0
    piece = next(pattern(MIB))[:65536]
    with contextlib.suppress(TimeoutError):
        while sent < BULK_BYTES:
            device.send(piece)
            sent += len(piece)
    assert sent < BULK_BYTES, "nothing held the device back"
    return sent + len(piece)


def _wait_until_stalled(progress: Callable[[], int]) -> int:
    """Wait until a count has begun and stands still; its value."""
    last, since = 0, time.monotonic()
    deadline = since + 20
    while time.monotonic() < deadline:
        now = progress()
        if now != last or not now:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > STALLED_S:
            return now
        time.sleep(0.05)
    raise AssertionError(f"still going on: {last}")


def _check_growth(watch: MemoryWatch, what: str, measured: Callable[[str], None]) -> None:
    measured(f"{what}: worker grew by {watch.growth_bytes / MIB:.1f} MiB, bound {GROWTH_BYTES_MAX / MIB:.0f}")
    assert watch.growth_bytes < GROWTH_BYTES_MAX
