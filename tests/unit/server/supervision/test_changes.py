"""What signals ask of the supervisor."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway.net.loop import run
from gateway.server.supervision.changes import Changes
from gateway.server.supervision.notify import ServiceManager
from gateway.server.supervision.upgrade import Program, stamp
from gateway.telemetry.metrics import SupervisorMetrics


def test_an_upgrade_is_not_lost_behind_reloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind one waits, while another one is being done."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)  # the tests themselves may run under a service manager
    registry = CollectorRegistry()
    program = Program(run=("gone",), check=("false",), code=tmp_path, stamp=stamp(tmp_path))

    async def scenario() -> None:
        applying, may_go_on = asyncio.Event(), asyncio.Event()

        async def apply(_settings: Any) -> None:
            applying.set()
            await may_go_on.wait()

        async def replace() -> OSError:
            raise AssertionError("`false` has refused it")

        changes = Changes(
            program,
            load=lambda: None,  # type: ignore[arg-type,return-value]  # handed on to `apply` as it is
            settings=lambda: SimpleNamespace(data_dir=tmp_path),  # type: ignore[arg-type,return-value]  # all that is read of them
            apply=apply,
            replace=replace,
            status=lambda: "",
            manager=ServiceManager(),
            metrics=SupervisorMetrics(registry, version="1", python="3", openssl="4"),
        )
        running = asyncio.get_running_loop().create_task(changes.run())
        changes.ask("reload")
        await applying.wait()
        for order in ("reload", "reload", "upgrade", "upgrade"):
            changes.ask(order)
        may_go_on.set()
        async with asyncio.timeout(10):
            while not _count("pskgw_upgrades_total", outcome="refused"):  # noqa: ASYNC110 - within the deadline above
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # in which a second upgrade would be done, if one were waiting
        running.cancel()

    def _count(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, labels) or 0.0

    run(scenario())
    assert _count("pskgw_config_reloads_total", outcome="applied") == 2
    assert _count("pskgw_upgrades_total", outcome="refused") == 1
