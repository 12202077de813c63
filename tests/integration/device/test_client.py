"""The client library against real gateways."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.device import Client, ClientSettings, DeviceRefused, FileStore, Key, KeyRing
from gateway.net.loop import run
from gateway.registry.store import NewDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

KEY = Key(bytes(range(32)))
DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = new_gateway(tmp_path_factory.mktemp("client") / "gateway")
    gateway.add_devices(*(NewDevice(identity=name, key=KEY) for name in ("scripted", "offline")))
    with running(gateway):
        yield gateway


def ring(device: Device) -> KeyRing:
    return KeyRing.of(device.identity, Key(bytes.fromhex(device.key)))


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_the_documented_script_works(gateway: Gateway, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(import asyncio.*?)```", (DOCS / "client.md").read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 10
    device = Device("scripted", KEY.hex())
    (tmp_path / "send.py").write_text(script)
    key_file = private(tmp_path / "key", device.key)
    done = subprocess.run(
        [sys.executable, tmp_path / "send.py", "127.0.0.1", str(gateway.port()), "scripted", key_file],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | {"PYTHONPATH": str(DOCS.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("safe at the gateway: ")
    (event,) = [event for event in gateway.output_events() if event["device"] == "scripted"]
    assert event["data"] == "21.5"


def test_a_device_that_is_not_known_is_refused(gateway: Gateway) -> None:
    async def scenario() -> None:
        with pytest.raises(DeviceRefused):
            async with Client("127.0.0.1", gateway.port(), KeyRing.of("nobody", Key(bytes(range(32))))):
                pytest.fail("connected")

    run(scenario())


@pytest.mark.parametrize("store", ["memory", "file"])
def test_nothing_is_lost_or_told_twice_over_restarts_of_the_gateway(tmp_path: Path, store: str) -> None:
    """Three restarts, one of them kill -9 of the whole gateway, under a client that goes on sending."""
    gateway = new_gateway(tmp_path / "gateway")
    device = gateway.add_device("meter-7")
    port = _fixed_port(gateway)
    told: dict[str, int] = {}
    count = 1500

    async def send_all() -> None:
        settings = ClientSettings(back_off_first_s=0.05, back_off_longest_s=0.2, in_flight_max=64)
        kept = FileStore(tmp_path / "store.db") if store == "file" else None
        async with Client("127.0.0.1", port, ring(device), settings=settings, store=kept) as client:

            async def send_some(first: int) -> None:
                for number in range(first, count, 30):
                    receipt = await client.send(b"%d" % number)
                    assert receipt.message_id not in told
                    told[receipt.message_id] = number
                    await asyncio.sleep(0.02)

            async def restart() -> None:
                for number, kill in ((0.2, False), (0.5, True), (0.8, False)):
                    while len(told) < number * count:  # noqa: ASYNC110 - a count, not an event
                        await asyncio.sleep(0.02)
                    await asyncio.to_thread(_restart, gateway, kill=kill)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(restart())
                for first in range(30):
                    tasks.create_task(send_some(first))
            assert client.unanswered == 0

    with running(gateway):
        run(send_all())
        assert sorted(told.values()) == list(range(count))
        events = gateway.output_events()
    arrived = [int(event["data"]) for event in events]
    assert set(arrived) == set(range(count))
    sessions = {event["id"].rpartition("-")[0] for event in events}
    assert len(sessions) >= 4


def _fixed_port(gateway: Gateway) -> int:
    """The same port after every restart."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    text = gateway.config.read_text()
    gateway.config.write_text(
        text.replace('name = "tls"\nbind = "127.0.0.1:0"', f'name = "tls"\nbind = "127.0.0.1:{port}"')
    )
    return port


def _restart(gateway: Gateway, *, kill: bool) -> None:
    if kill:
        pids = gateway.pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert gateway.process is not None
        gateway.process.wait()
        gateway.process = None
        wait_for(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the end of all processes"
        )
    else:
        assert gateway.stop() == 0
    gateway.start()


def test_a_client_left_with_messages_finds_them_again(gateway: Gateway, tmp_path: Path) -> None:
    """A device that was switched off before its gateway came back."""
    device = Device("offline", KEY.hex())

    async def collect() -> None:
        store = FileStore(tmp_path / "store.db")
        async with Client(
            "127.0.0.1", 9, ring(device), store=store, start_offline=True, close_timeout_s=0
        ) as client:
            for number in range(100):
                await client.post(b"reading %d" % number)

    async def deliver() -> None:
        store = FileStore(tmp_path / "store.db")
        async with Client("127.0.0.1", gateway.port(), ring(device), store=store) as client:
            assert client.unanswered > 0
            await client.flush()

    run(collect())
    run(deliver())
    run_events = [event["data"] for event in gateway.output_events() if event["device"] == "offline"]
    assert run_events == [f"reading {number}" for number in range(100)]
