"""A flood of strangers, half of it from the good devices' own address: the good ones keep connecting and exchanging."""

import asyncio
import contextlib
import dataclasses
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.device.client import DeviceClient
from gateway.registry.sealing import Key
from gateway.registry.store import NewDevice
from tests.support.devices import tcp_socket
from tests.support.gateway import Device, new_gateway, running

OWN, OTHER = "127.0.0.1", "127.0.44.1"
DEADLINE_S = 30.0
PAUSE_S = 1.0
"""Of a good device between its connections."""


@dataclasses.dataclass
class Times:
    """Seconds that good devices took."""

    connects: list[float] = dataclasses.field(default_factory=list)
    exchanges: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"p99 of {len(self.connects)} connects {_p99(self.connects) * 1e3:.1f} ms (median {statistics.median(self.connects) * 1e3:.1f}), "
            f"of {len(self.exchanges)} exchanges {_p99(self.exchanges) * 1e3:.1f} ms (median {statistics.median(self.exchanges) * 1e3:.1f})"
        )


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


@pytest.mark.parametrize(
    ("good", "silent", "seconds"),
    [
        (50, 500, 5.0),
        pytest.param(500, 5_000, 30.0, marks=[pytest.mark.prove, pytest.mark.timeout(600)]),
    ],
)
def test_good_devices_go_on_through_a_flood(
    tmp_path: Path, measured: Callable[[str], None], good: int, silent: int, seconds: float
) -> None:
    gateway = new_gateway(tmp_path / "gateway", limits="handshake_timeout_s = 60")
    devices = gateway.add_devices(*(NewDevice(identity=f"good-{number}") for number in range(good)))
    with running(gateway):
        port = gateway.port()
        calm = asyncio.run(_exchange(port, devices, seconds))
        with _silent(port, silent), _flood(port) as counts:
            stormy = asyncio.run(_exchange(port, devices, seconds))
        assert gateway.stop() == 0
        assert gateway.complaints() == []
    strangers = sum(counts)
    measured(
        f"{good} good devices, without flood: {calm}; with {silent} silent connections and "
        f"{strangers / seconds:.0f} strangers a second: {stormy}"
    )
    assert strangers > 100 * seconds
    assert len(stormy.connects) >= good
    assert _p99(stormy.connects) < DEADLINE_S / 3
    assert _p99(stormy.exchanges) < DEADLINE_S / 3


async def _exchange(port: int, devices: list[Device], seconds: float) -> Times:
    """Every device connects, sends two messages, closes, and after a pause begins anew. Whatever fails is raised."""
    times = Times()
    end = time.monotonic() + seconds

    async def live(number: int, device: Device) -> None:
        await asyncio.sleep(PAUSE_S * number / len(devices))
        while time.monotonic() < end:
            began = time.monotonic()
            key = Key(bytes.fromhex(device.key))
            client = await DeviceClient.connect(OWN, port, device.identity, key, timeout_s=DEADLINE_S)
            times.connects.append(time.monotonic() - began)
            for _ in range(2):
                began = time.monotonic()
                await client.send(b"a reading\n")
                assert (await client.receive()).startswith(b"ok ")
                times.exchanges.append(time.monotonic() - began)
            await client.close()
            await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as tasks:
        for number, device in enumerate(devices):
            tasks.create_task(live(number, device))
    return times


@contextlib.contextmanager
def _silent(port: int, count: int) -> Iterator[None]:
    """Connections that say nothing, half of them from the good devices' address."""
    with contextlib.ExitStack() as held:
        for number in range(count):
            sock: socket.socket = tcp_socket(port, OWN if number % 2 else OTHER)
            held.callback(sock.close)
        yield


@contextlib.contextmanager
def _flood(port: int) -> Iterator[list[int]]:
    """One process from each address; how many hellos each sent stands in the list afterwards."""
    counts: list[int] = []
    floods = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.flood", str(port), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for address in (OWN, OTHER)
    ]
    try:
        for flood in floods:
            assert flood.stdout is not None
            assert flood.stdout.readline() == "ready\n"
        yield counts
        counts += [int(flood.communicate(timeout=30)[0]) for flood in floods]
    finally:
        for flood in floods:
            flood.kill()
            flood.communicate()
