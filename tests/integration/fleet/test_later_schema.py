"""The registry is migrated by a later program while gateways of this one run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from gateway.config import load
from gateway.registry import schema
from gateway.registry.database import make_engine
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.later_migrations import ADDITIVE, BREAKING, migrate_later
from tests.support.psk_device import Session, is_accepted


@pytest.fixture(params=["sqlite", "postgresql"])
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Gateway:
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""
    gateway = new_gateway(tmp_path / "gateway", registry_url=url)
    gateway.ctl("migrate")
    return gateway


@pytest.fixture
def engine(gateway: Gateway) -> Iterator[Engine]:
    engine = make_engine(load(gateway.config).registry.url)
    yield engine
    engine.dispose()


def check_accepted(gateway: Gateway, device: Device) -> None:
    wait_for(
        lambda: is_accepted(gateway.port(), device.identity, device.key), what=f"{device.identity} is in"
    )


def test_an_old_gateway_runs_and_starts_again_until_a_migration_breaks_it(
    gateway: Gateway, engine: Engine, tmp_path: Path
) -> None:
    with running(gateway):
        device = gateway.add_device("before")
        check_accepted(gateway, device)
        with Session(gateway.port(), device.identity, device.key) as session:
            migrate_later(engine, tmp_path, ADDITIVE)
            check_accepted(gateway, gateway.add_device("beside a newer schema"))
            assert session.ask(b"still here") == b"ok 1"
        assert ADDITIVE in gateway.ctl("migrate").stdout
        assert gateway.stop() == 0
        gateway.start()
        check_accepted(gateway, gateway.add_device("after a restart"))
        assert gateway.complaints() == []

        migrate_later(engine, tmp_path, BREAKING)
        advice = f"this one knows {schema.SCHEMA_REVISION}: upgrade this program"
        event = gateway.wait_for_event("registry_unusable", state="mismatch")
        assert advice in event["reason"]
        check_accepted(gateway, device)
        assert gateway.stop() == 0
    for command in (["add-device", "nobody"], ["migrate"], ["run"]):
        refused = gateway.ctl(*command, check=False)
        assert refused.returncode == 1
        assert advice in refused.stderr.splitlines()[-1]
