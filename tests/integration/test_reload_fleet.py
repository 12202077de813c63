"""A fleet that reconnects, over reloads and upgrades: nobody is refused, nothing that was acknowledged is lost.

The figures of the form in full size stand in docs/reload.md.
"""

import os
import signal
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.fleet import Fleet, judge
from tests.support.gateway import Gateway, new_gateway, running, wait_for

SPOOLED = '[[routes]]\nname = "spooled"\nmatch = { group = "spooled" }\ndelivery = "spooled"\n'
DIRECT = '[[routes]]\nname = "direct"\n'
ROUTE = 'framing = "lines"\ncontent_type = "text/plain"\nbackend = "events"\n'


@pytest.mark.parametrize(
    ("devices", "reloads", "upgrades", "rate", "drain_s"),
    [
        pytest.param(50, 2, 1, 4.0, 2, id="50"),
        pytest.param(500, 10, 3, 1.0, 10, id="500", marks=[pytest.mark.prove, pytest.mark.timeout(900)]),
    ],
)
def test_a_fleet_over_reloads_and_upgrades(  # noqa: PLR0917 - the two forms side by side
    tmp_path: Path,
    devices: int,
    reloads: int,
    upgrades: int,
    rate: float,
    drain_s: int,
) -> None:
    gateway = new_gateway(tmp_path / "gateway", node="workers = 2", routes=SPOOLED + ROUTE + DIRECT + ROUTE)
    gateway.config.write_text(gateway.config.read_text().replace("drain_s = 3", f"drain_s = {drain_s}"))
    fleet_devices = gateway.add_devices(
        *(
            NewDevice(identity=f"d{number}", group="spooled" if number % 2 else None)
            for number in range(devices)
        )
    )
    with running(gateway):
        port = gateway.port()  # once: looking it up reads the whole log, in the loop of all devices
        with Fleet(lambda: port, fleet_devices, rate=rate, window=4) as fleet:
            wait_for(lambda: gateway.metric("pskgw_connections") == devices, 120, "all are connected")
            for number in range(reloads):
                _reload(gateway, number)
                fleet.wait_for_acknowledged(devices, 60)
            assert fleet.connections == devices, "a reload ended a session"
            for _ in range(upgrades):
                _upgrade(gateway, drain_s)
                fleet.wait_for_acknowledged(devices, 120)
            wait_for(lambda: gateway.metric("pskgw_connections") == devices, 60, "all are back")
        outcomes = gateway.metric_by("outcome", "pskgw_handshakes_total")
        wait_for(lambda: not gateway.metric("pskgw_outbox_messages"), 30, "the spools are empty")
        assert gateway.metric_by("outcome", "pskgw_config_reloads_total") == {"applied": reloads}
        assert gateway.metric_by("outcome", "pskgw_upgrades_total") == {"done": upgrades}
        assert gateway.metric("pskgw_process_restarts_total") == 0
    assert fleet.failures == []
    assert outcomes == {"ok": fleet.connections}
    assert fleet.connections <= devices * (1 + upgrades)
    assert max(fleet.orderly_ends.values(), default=0) <= upgrades
    verdict = judge(fleet.acknowledged, gateway.output_events()).check()
    assert gateway.complaints() == []
    print(
        f"{devices} devices, {reloads} reloads, {upgrades} upgrades: {fleet.connections} handshakes, "
        f"{fleet.orderly_ends.total()} orderly ends, {verdict.acknowledged} acknowledged, "
        f"{len(verdict.missing)} missing, {verdict.duplicates} twice"
    )


def _reload(gateway: Gateway, number: int) -> None:
    """Another limit each time, and another setting of a route that every second one uses."""
    text = gateway.config.read_text().splitlines()
    kept = [line for line in text if not line.startswith(("idle_timeout_s", "device_messages_per_s"))]
    kept.insert(kept.index("[limits]") + 1, f"idle_timeout_s = {1000 + number}")
    kept.insert(kept.index('name = "direct"') + 1, f"device_messages_per_s = {1000 + number}")
    gateway.config.write_text("\n".join(kept))
    assert gateway.process is not None
    os.kill(gateway.process.pid, signal.SIGHUP)
    _wait_for_log(gateway, "reloaded", number + 1)


def _upgrade(gateway: Gateway, drain_s: float) -> None:
    """Until the old workers are gone."""
    assert gateway.process is not None
    done, old = len(gateway.events("upgraded")), set(gateway.worker_pids())
    os.kill(gateway.process.pid, signal.SIGUSR2)
    _wait_for_log(gateway, "upgraded", done + 1)
    wait_for(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in old),
        drain_s + 10,
        "the old workers are gone",
    )


def _wait_for_log(gateway: Gateway, event: str, count: int) -> None:
    """Without parsing the log over and over: the devices run in this process."""
    needle = f'"event":"{event}"'.encode()
    wait_for(lambda: gateway.log_path.read_bytes().count(needle) >= count, 60, event)
