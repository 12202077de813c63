"""A device that is added connects, and one that is disabled or removed is cut off, within a second and by itself."""

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from gateway.registry.store import NewDevice, Registry
from tests.support.devices import End, Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running

TRIES = 20
WITHIN_S = 1.0
STAGGER_S = 0.06
"""On average between two changes, so that they meet the follower's poll (every 0.5 s) at every phase."""


@pytest.fixture(params=["sqlite", "postgresql"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""
    # Devices that knock all the time, before they are known, would be answered late.
    gateway = new_gateway(
        tmp_path_factory.mktemp("changes") / "gateway",
        node="workers = 2",
        registry_url=url,
        limits="penalty_max_s = 0",
    )
    if url:
        gateway.ctl("migrate")
    with running(gateway):
        yield gateway
        assert gateway.complaints() == []


def test_changes_are_seen_within_a_second(gateway: Gateway, measured: Callable[[str], None]) -> None:
    port = gateway.port()
    with ThreadPoolExecutor(TRIES) as threads, gateway.registry() as registry:
        added = _change_each(threads, lambda number: _add(registry, port, number))
        devices = [device for device, _ in (each.result() for each in added)]
        _report(measured, "add to first accepted handshake", [delay for _, delay in _results(added)])

        sessions = [TlsDevice.connect(port, device) for device in devices]
        disabled = _change_each(
            threads,
            lambda number: _cut(
                lambda name: registry.set_device_enabled("default", name, enabled=False),
                sessions[number],
                devices[number],
            ),
        )
        _report(measured, "disable to close_notify", [delay for _, delay in _results(disabled)])
        for device in devices:
            with pytest.raises(Refused):
                TlsDevice.connect(port, device)

        enabled = _change_each(threads, lambda number: _enable(registry, port, devices[number]))
        _report(measured, "enable to first accepted handshake", [delay for _, delay in _results(enabled)])

        sessions = [TlsDevice.connect(port, device) for device in devices]
        removed = _change_each(
            threads,
            lambda number: _cut(
                lambda name: registry.remove_device("default", name), sessions[number], devices[number]
            ),
        )
        _report(measured, "remove to close_notify", [delay for _, delay in _results(removed)])

    for reason in ("disabled", "removed"):
        assert len([e for e in gateway.events("session_stopped") if e["reason"] == reason]) == TRIES
    outcomes = gateway.metric_by("outcome", "pskgw_handshakes_total")
    assert outcomes["disabled"] >= TRIES
    assert gateway.metric("pskgw_revocation_seconds_count") == 2 * TRIES
    assert gateway.metric("pskgw_revocation_seconds_bucket", le="1.0") == 2 * TRIES


def test_a_device_that_is_connected_twice_loses_both_sessions(gateway: Gateway) -> None:
    (device,) = gateway.add_devices(NewDevice(identity="twice"))
    gateway.wait_until_followed()
    port = gateway.port()
    sessions = [TlsDevice.connect(port, device) for _ in range(6)]
    with TlsDevice.connect(port, device) as one_more:
        one_more.send(b"line\n")
        assert one_more.receive_line() == "ok 1"
        gateway.ctl("remove-device", "twice")
        for session in [*sessions, one_more]:
            assert session.receive_to_end() == b""
            assert session.end is End.NOTIFIED
            session.close()
    assert gateway.sessions() == []
    assert gateway.metric("pskgw_revocation_seconds_count") == len(sessions) + 1


Result = tuple[Device, float]
"""A device, and the seconds from the commit of a change until it was felt."""


def _change_each(
    threads: ThreadPoolExecutor, change: Callable[[int], Callable[[], Result]]
) -> list[Future[Result]]:
    """Make one change after the other; each is watched by a thread of its own."""
    source = random.Random(3)
    pause = threading.Event()
    watched = []
    for number in range(TRIES):
        watched.append(threads.submit(change(number)))
        pause.wait(source.uniform(0, 2 * STAGGER_S))
    return watched


def _add(registry: Registry, port: int, number: int) -> Callable[[], Result]:
    added = registry.add_device(NewDevice(identity=f"device-{number}"))
    device = Device(added.identity, added.key.hex())
    return _until_accepted(port, device)


def _enable(registry: Registry, port: int, device: Device) -> Callable[[], Result]:
    registry.set_device_enabled("default", device.identity, enabled=True)
    return _until_accepted(port, device)


def _until_accepted(port: int, device: Device) -> Callable[[], Result]:
    committed = time.monotonic()

    def watch() -> Result:
        while time.monotonic() - committed < 5 * WITHIN_S:
            try:
                with TlsDevice.connect(port, device):
                    return device, time.monotonic() - committed
            except Refused:
                time.sleep(0.01)
        raise AssertionError(f"{device.identity} was never accepted")

    return watch


def _cut(change: Callable[[str], object], session: TlsDevice, device: Device) -> Callable[[], Result]:
    change(device.identity)
    committed = time.monotonic()

    def watch() -> Result:
        with session:
            assert session.receive_to_end() == b""
            assert session.end is End.NOTIFIED
        return device, time.monotonic() - committed

    return watch


def _results(watched: list[Future[Result]]) -> list[Result]:
    return [each.result() for each in watched]


def _report(measured: Callable[[str], None], what: str, delays_s: list[float]) -> None:
    measured(
        f"{what}: {statistics.median(delays_s):.2f} s in the middle, {max(delays_s):.2f} s at most, of {len(delays_s)}"
    )
    assert max(delays_s) < WITHIN_S
