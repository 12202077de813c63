"""Gateways to be treated badly."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.registry.store import NewDevice
from tests.integration.mariadb import mariadb_server
from tests.integration.postgresql import postgres_server, postgres_url
from tests.support.devices import TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

__all__ = ["Stage", "mariadb_server", "postgres_server", "postgres_url"]

HANDSHAKE_TIMEOUT_S = 1.0
TICK_S = 0.25
"""Deadlines are kept late by this at most, and by what a busy machine adds."""


@dataclasses.dataclass
class Stage:
    """A gateway that bad things are done to, with a device connected all the while that must not notice."""

    gateway: Gateway
    device: Device
    port: int
    beside: TlsDevice
    answered: int = 0

    def handshakes(self) -> Counter[str]:
        return self.gateway.metric_by("outcome", "pskgw_handshakes_total")

    @contextlib.contextmanager
    def counts(self, outcome: str, count: int = 1) -> Iterator[None]:
        """What happens in the block is counted under this outcome, under nothing else, and leaves nothing open."""
        before = self.handshakes()
        yield
        wait_for(
            lambda: (self.handshakes() - before).total() >= count, what=f"a handshake counted as {outcome}"
        )
        assert self.handshakes() - before == {outcome: count}
        wait_for(lambda: self.gateway.metric("pskgw_connections") == 1, what="the connection gone")

    def last_failure(self) -> dict[str, Any]:
        """The last log line of a handshake that failed."""
        return self.gateway.events("handshake_failed")[-1]

    def check_beside(self) -> None:
        """The other device has its session still, and is served at once."""
        self.answered += 1
        began = time.monotonic()
        self.beside.send(b"still here\n")
        assert self.beside.receive_line() == f"ok {self.answered}"
        assert time.monotonic() - began < 1


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def shared_stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    gateway = new_gateway(
        tmp_path_factory.mktemp("bad") / "gateway",
        limits=f"handshake_timeout_s = {HANDSHAKE_TIMEOUT_S}",
        asyncio_only=request.param == "asyncio",
    )
    device, other = gateway.add_devices(NewDevice(identity="d"), NewDevice(identity="beside"))
    with running(gateway):
        port = gateway.port()
        with TlsDevice.connect(port, other) as beside:
            yield Stage(gateway, device, port, beside)
        assert gateway.stop() == 0
        assert gateway.complaints() == []


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """The gateway of the module; after each test the device beside goes on as before."""
    yield shared_stage
    shared_stage.check_beside()
