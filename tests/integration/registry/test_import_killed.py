"""`import-devices` ended in the middle, as a process of its own: nothing is half-written, and it goes on."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from sqlalchemy import Engine, func, select

from gateway.registry import schema
from gateway.registry.database import make_engine
from tests.support.gateway import Gateway, new_gateway, wait_for

DEVICES = 12_000


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        rows = select(func.count()).select_from(schema.metadata.tables[table])
        return connection.execute(rows).scalar_one()


def begin(gateway: Gateway, path: Path) -> subprocess.Popen[str]:
    command = ["import-devices", str(path), "--format", "mosquitto", "--config", str(gateway.config)]
    return subprocess.Popen(
        [sys.executable, "-m", "gateway", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_import_that_was_killed_goes_on(url: str, tmp_path: Path) -> None:
    end_and_go_on(url, tmp_path, signal.SIGKILL)


def test_an_import_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    returncode, said = end_and_go_on(f"sqlite:///{tmp_path}/registry.db", tmp_path, signal.SIGINT)
    assert returncode == 130
    assert said == "error: interrupted: the same command goes on where it was\n"


def end_and_go_on(url: str, tmp_path: Path, number: signal.Signals) -> tuple[int, str]:
    """What the import said that was ended by this signal, after it was finished by another."""
    gateway = new_gateway(tmp_path / "gateway", registry_url=url)
    gateway.ctl("migrate")
    path = tmp_path / "psk"
    path.write_text("".join(f"dev-{each}:{each:064x}\n" for each in range(DEVICES)))
    engine = make_engine(url)
    try:
        with begin(gateway, path) as process:
            wait_for(lambda: count(engine, "devices"), 30, "a chunk that is written")
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        there = count(engine, "devices")
        assert 0 < there < DEVICES
        assert count(engine, "credentials") == there
        assert there % 2_000 == 0, "whole chunks"
        assert count(engine, "imports") == 1

        shown = json.loads(gateway.ctl("import-devices", path, "--format", "mosquitto", "--json").stdout)
        assert (shown["imported_before"], shown["added"]) == (there, DEVICES - there)
        assert count(engine, "devices") == count(engine, "credentials") == DEVICES
        assert count(engine, "imports") == 0
        with gateway.registry() as registry:
            assert registry.verify_audit().faults == []
        return process.returncode, said
    finally:
        engine.dispose()
