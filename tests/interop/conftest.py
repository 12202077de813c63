"""Gateways for real clients. The one of `fleet` is shared by all tests that leave its devices as they are."""

import contextlib
import dataclasses
import datetime as dt
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.store import NewDevice, Registry
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.peers import Mosquitto, Peer

ROUTES = """
[[routes]]
name = "mqtt"
match = { group = "mqtt" }
framing = "stream"
backend = "broker"
[[routes]]
name = "second"
match = { alpn = "readings/2" }
framing = "lines"
content_type = "text/plain"
ack = true
backend = "second"
[[routes]]
name = "first"
match = { alpn = "readings/1" }
framing = "lines"
content_type = "text/plain"
ack = true
backend = "events"
[[routes]]
name = "lines"
match = { group = "lines" }
framing = "lines"
content_type = "text/plain"
ack = true
backend = "events"
"""

LISTENERS = """
realm = "default"
profile = "compatible"
realms_by_sni = { "north.example" = "north", "hall.example" = "hall" }
[[listeners]]
name = "modern"
bind = "127.0.0.1:0"
profile = "modern"
"""

HINT = "Halle 7 Süd"
DEVICES_EACH = 24
"""How many devices of a group stand ready for tests that change or end them."""


@dataclasses.dataclass
class Fleet:
    """A running gateway and the devices that it knows, by name."""

    gateway: Gateway
    devices: dict[str, Device] = dataclasses.field(default_factory=dict)
    taken: set[str] = dataclasses.field(default_factory=set)

    def __getitem__(self, name: str) -> Device:
        return self.devices[name]

    @property
    def port(self) -> int:
        """Of the listener `tls`."""
        return self.gateway.port()

    def add(self, *devices: NewDevice) -> None:
        """More devices. One whose realm is not `default` is called `REALM/IDENTITY`."""
        for new, device in zip(devices, self.gateway.add_devices(*devices), strict=True):
            self.devices[new.identity if new.realm == "default" else f"{new.realm}/{new.identity}"] = device

    def add_by_command(self, identity: str, *options: object) -> Device:
        """One more, by `gatewayctl add-device`."""
        device = self.gateway.add_device(identity, *options)
        self.devices[identity] = device
        return device

    def take(self, group: str) -> Device:
        """One of the devices `GROUP N`, that no test had before."""
        names = (f"{group} {number}" for number in range(DEVICES_EACH))
        name = next((name for name in names if name not in self.taken), None)
        assert name is not None, f"add more devices to the group {group}"
        self.taken.add(name)
        return self.devices[name]

    @contextlib.contextmanager
    def change(self) -> Iterator[Registry]:
        """The registry, for one change while the gateway runs; at the end the gateway knows of it."""
        known = self.gateway.metric("pskgw_registry_revision")
        with self.gateway.registry() as registry:
            yield registry
        wait_for(lambda: self.gateway.metric("pskgw_registry_revision") > known, what="the change")

    def arrives(self, peer: Peer, answers: str = "", file: str = "events.jsonl") -> dict[str, Any]:
        """Send a line and wait for `ok`; the event, which must stand in the file by then."""
        payload = f"reading {uuid.uuid4()}"
        peer.send(payload + "\n")
        peer.expect(rf"^{answers}ok \d+\n")
        (event,) = (event for event in self.gateway.output_events(file) if event["data"] == payload)
        return event


def check_health(gateway: Gateway, devices: dict[str, Device]) -> None:
    """After all that the tests did: nothing is wrong in the log, and no key is in it."""
    assert gateway.complaints() == []
    said = (gateway.log_path.read_bytes() + gateway.stdout_path.read_bytes()).lower()
    for device in devices.values():
        assert device.key.encode() not in said, f"the key of {device.identity} is in the log"
        assert bytes.fromhex(device.key).lower() not in said, f"the key of {device.identity} is in the log"


@contextlib.contextmanager
def running_fleet(fleet: Fleet) -> Iterator[Fleet]:
    """Start its gateway; what that said is checked at the end."""
    with running(fleet.gateway):
        yield fleet
        check_health(fleet.gateway, fleet.devices)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A Mosquitto without TLS, the backend `broker`."""
    with Mosquitto(tmp_path_factory.mktemp("mosquitto")) as broker:
        yield broker


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The shared gateway: one worker, listeners `tls` and `modern`, realms `default`, `north` and `hall` (with a hint)."""
    gateway = new_gateway(
        tmp_path_factory.mktemp("shared") / "gateway",
        listener=LISTENERS,
        routes=ROUTES,
        backends='[backends.second]\nkind = "file"\npath = "second.jsonl"\n'
        '[backends.broker]\nkind = "tcp"\nurl = "tcp://127.0.0.1:9"\n',
    )
    gateway.ctl("add-realm", "north")
    gateway.ctl("add-realm", "hall", "--hint", HINT)
    fleet = Fleet(gateway)
    fleet.add(
        NewDevice(identity="meter", group="lines"),
        NewDevice(identity="meter", group="lines", realm="north"),
        NewDevice(identity="meter", group="lines", realm="hall"),
        NewDevice(identity="Zähler 8 ☀", group="lines"),
        NewDevice(identity="x" * 128, group="lines"),
        NewDevice(identity="here", group="lines", networks=("127.0.0.0/8",)),
        NewDevice(identity="disabled", group="lines"),
        NewDevice(identity="nowhere"),
    )
    gateway.ctl("disable-device", "disabled")
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    fleet.add_by_command("expired", "--group", "lines", "--not-after", "2026-01-31")
    fleet.add_by_command("early", "--group", "lines", "--not-before", tomorrow.isoformat())
    networks = ("--allow-from", "192.0.2.0/24", "--allow-from", "2001:db8::/32")
    fleet.add_by_command("elsewhere", "--group", "lines", *networks)
    with running_fleet(fleet):
        yield fleet


@pytest.fixture(scope="session", params=["uvloop", "asyncio"])
def either_loop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto
) -> Iterator[Fleet]:
    """A gateway on each of the event loops, with Mosquitto behind it. What a test ends or changes, it takes for itself."""
    gateway = new_gateway(
        tmp_path_factory.mktemp(request.param) / "gateway",
        routes=ROUTES,
        backends='[backends.second]\nkind = "file"\npath = "second.jsonl"\n'
        f'[backends.broker]\nkind = "tcp"\nurl = "tcp://127.0.0.1:{broker.port}"\n',
        asyncio_only=request.param == "asyncio",
    )
    fleet = Fleet(gateway)
    fleet.add(
        NewDevice(identity="meter", group="lines"),
        NewDevice(identity="mqtt", group="mqtt"),
        NewDevice(identity="mqtt too", group="mqtt"),
    )
    for group in ("lines", "mqtt"):
        fleet.add(*(NewDevice(identity=f"{group} {number}", group=group) for number in range(DEVICES_EACH)))
    with running_fleet(fleet):
        (worker,) = gateway.worker_pids()
        assert ("uvloop" in Path(f"/proc/{worker}/maps").read_text()) == (request.param == "uvloop")
        yield fleet
