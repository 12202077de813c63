"""Networks that drop packets: a backend that is there and cannot be reached, devices that lost their power."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.capabilities import Unavailable, missing
from tests.support.devices import TlsDevice
from tests.support.fleet import Fleet, judge
from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.network import FarService, Network, network
from tests.support.services import Peer, Service, echo

CONNECT_S = 4.0
"""Twice `connect_timeout_s`: what was tried at once, and what is tried again."""
FOUND_S = 120.0
"""Until a peer that is gone without a word is found: keep-alive and the user time-out say so."""
LATE_S = 20.0
"""One more probe, and what a busy machine adds."""


@pytest.fixture
def far() -> Iterator[Network]:
    try:
        with network() as found:
            yield found
    except Unavailable as exc:
        missing(str(exc))


class Collector:
    """An HTTP server that keeps the events which it confirmed."""

    def __init__(self) -> None:
        self.events: list[dict[str, str]] = []

    async def __call__(self, peer: Peer) -> None:
        data = b""
        while piece := await peer.receive():
            data += piece
            while (head := data.find(b"\r\n\r\n")) >= 0:
                length = int(data[:head].lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                if len(data) < head + 4 + length:
                    break
                self.events += json.loads(data[head + 4 : head + 4 + length])
                data = data[head + 4 + length :]
                await peer.send(b"HTTP/1.1 204 No Content\r\n\r\n")


ROUTES = """
[[routes]]
name = "stream"
match = { identity = "s*" }
framing = "stream"
backend = "service"
[[routes]]
name = "spooled"
match = { identity = "d*" }
framing = "lines"
delivery = "spooled"
delivery_timeout_s = 2
content_type = "text/plain"
backend = "collector"
[[routes]]
name = "beside"
framing = "lines"
content_type = "text/plain"
backend = "events"
"""


def black_holed_gateway(directory: Path, service: FarService, collector: FarService) -> Gateway:
    collector_url = collector.url.replace("tcp:", "http:")
    return new_gateway(
        directory,
        routes=ROUTES,
        backends=f'[backends.service]\nkind = "tcp"\nurl = "{service.url}"\nconnect_timeout_s = 2\n'
        f'[backends.collector]\nkind = "http"\nurl = "{collector_url}/"\nconnect_timeout_s = 2\nrequest_timeout_s = 2\n',
    )


@pytest.mark.parametrize(
    "away_s", [6, pytest.param(150, marks=[pytest.mark.prove, pytest.mark.timeout(400)])]
)
def test_a_backend_that_cannot_be_reached(
    tmp_path: Path, far: Network, away_s: float, measured: Callable[[str], None]
) -> None:
    """Streams to it wait and are cut when it stays away; spooled messages arrive later; who is beside notices nothing."""
    collected = Collector()
    with FarService(echo, far) as service, FarService(collected, far) as collector:
        gateway = black_holed_gateway(tmp_path / "gateway", service, collector)
        stream, other_stream, beside, *devices = gateway.add_devices(
            *(NewDevice(identity=name) for name in ("s0", "s1", "beside", "d0", "d1", "d2", "d3"))
        )
        with running(gateway):
            port, waits = gateway.port(), []
            with (
                TlsDevice.connect(port, stream, timeout_s=FOUND_S + LATE_S) as session,
                TlsDevice.connect(port, beside) as neighbour,
                Fleet(gateway.port, devices, rate=50) as fleet,
            ):
                session.echo(b"before")
                fleet.wait_for_acknowledged(100)
                far.drop()
                session.send(b"into the dark")
                began = time.monotonic()
                with TlsDevice.connect(port, other_stream) as refused:
                    assert refused.receive_to_end() == b""
                refused_s = time.monotonic() - began
                number = 0
                while time.monotonic() < began + away_s:
                    number += 1
                    asked = time.monotonic()
                    neighbour.send(b"still here\n")
                    assert neighbour.receive_line() == f"ok {number}"
                    waits.append(time.monotonic() - asked)
                    time.sleep(0.05)
                fleet.wait_for_acknowledged(100)
                far.heal()
                healed = time.monotonic()
                if away_s < FOUND_S:
                    assert session.receive_exactly(13) == b"into the dark"
                else:
                    assert session.receive_to_end() == b""
                with TlsDevice.connect(port, other_stream) as again:
                    again.echo(b"again")
                wait_for(lambda: gateway.metric("pskgw_outbox_oldest_seconds") < 1, 60, "it catches up")
                recovered_s = time.monotonic() - healed
            wait_for(lambda: gateway.metric("pskgw_outbox_messages") == 0, 30, "the spool is empty")
            found = judge(fleet.acknowledged, collected.events).check()
    measured(
        f"backend black-holed for {away_s:.0f} s: a new stream was refused after {refused_s:.1f} s, slowest of {len(waits)} "
        f"answers beside {max(waits):.2f} s; {found.acknowledged} acknowledged, {len(found.missing)} lost, "
        f"{found.duplicates} twice; all well {recovered_s:.1f} s after it was back"
    )
    assert not fleet.errors
    assert refused_s < CONNECT_S + 1
    assert max(waits) < 1


@pytest.mark.prove
@pytest.mark.timeout(400)
def test_devices_that_lost_their_power(tmp_path: Path, far: Network, measured: Callable[[str], None]) -> None:
    """One that is idle, and one that something is being sent to."""

    async def talks_on(peer: Peer) -> None:
        while data := await peer.receive():
            for _ in range(1000):
                await peer.send(data)

    with Service(talks_on) as near:
        gateway = new_gateway(
            tmp_path / "gateway",
            routes='[[routes]]\nname = "stream"\nframing = "stream"\nbackend = "service"\n',
            backends=f'[backends.service]\nkind = "tcp"\nurl = "{near.url}"\n',
        )
        gateway.config.write_text(
            gateway.config.read_text().replace(
                'name = "tls"\nbind = "127.0.0.1:0"', f'name = "tls"\nbind = "{far.host}:0"'
            )
        )
        idle, busy = gateway.add_devices(NewDevice(identity="idle"), NewDevice(identity="busy"))
        with running(gateway), contextlib.ExitStack() as stack:
            with far.inside():
                stack.enter_context(TlsDevice.connect(gateway.port(), idle, host=far.host))
                talker = stack.enter_context(TlsDevice.connect(gateway.port(), busy, host=far.host))
            talker.send(b"x" * 10_000)
            talker.receive_exactly(10_000)
            far.drop()
            at = time.monotonic()
            wait_for(lambda: gateway.metric("pskgw_connections") == 0, FOUND_S + LATE_S, "both found")
            found_s = time.monotonic() - at
            reasons = {e["device"]: e["reason"] for e in gateway.events("connection_ended")}
    measured(f"both found after {found_s:.0f} s, as {reasons}")
    assert found_s < FOUND_S + LATE_S
