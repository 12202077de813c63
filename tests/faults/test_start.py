"""A gateway that cannot start says why in one line, exits with 1, and has changed nothing."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway.registry.database import make_engine
from tests.support.gateway import Gateway, new_gateway, running


def run_fails(gateway: Gateway) -> str:
    """Start it; the one line that it ends with."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "run", "--config", gateway.config],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


def use_port(gateway: Gateway, section: str, port: int) -> None:
    config = gateway.config.read_text()
    before, after = config.split(f"[{section}]" if section == "admin" else f"[[{section}]]", 1)
    head = f"[{section}]" if section == "admin" else f"[[{section}]]"
    gateway.config.write_text(before + head + after.replace("127.0.0.1:0", f"127.0.0.1:{port}", 1))


@pytest.mark.parametrize("section", ["listeners", "admin"])
def test_a_port_in_use(tmp_path: Path, section: str) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        use_port(gateway, section, taken.getsockname()[1])
        line = run_fails(gateway)
    assert "cannot listen on 127.0.0.1" in line
    assert "choose another address" in line


def test_a_port_that_another_gateway_shares(tmp_path: Path) -> None:
    """SO_REUSEPORT would let both in, and each would get a part of the devices."""
    one, other = new_gateway(tmp_path / "one"), new_gateway(tmp_path / "other")
    with running(one):
        use_port(other, "listeners", one.port())
        assert "cannot listen on 127.0.0.1" in run_fails(other)


def test_a_data_dir_in_use(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    with running(gateway):
        assert "another gateway uses" in run_fails(gateway)
        assert gateway.http("/readyz")[0] == 200
        gateway.ctl("list-sessions")


def no_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").unlink()


def other_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").write_text("00" * 32 + "\n")


def open_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").chmod(0o644)


def unknown_schema(gateway: Gateway) -> None:
    engine = make_engine(f"sqlite:///{gateway.directory / 'registry.db'}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()


def unknown_key(gateway: Gateway) -> None:
    gateway.config.write_text(gateway.config.read_text().replace("drain_s = 3", "drian_s = 3"))


def wrong_type(gateway: Gateway) -> None:
    gateway.config.write_text(gateway.config.read_text().replace("drain_s = 3", 'drain_s = "soon"'))


def no_configuration(gateway: Gateway) -> None:
    gateway.config.unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_master_key, "master.key does not exist"),
        (other_master_key, "does not open this registry"),
        (open_master_key, "chmod 600"),
        (unknown_schema, "upgrade"),
        (unknown_key, "node.drian_s"),
        (wrong_type, "node.drain_s"),
        (no_configuration, "gateway.toml"),
    ],
)
def test_a_wrong_set_up(tmp_path: Path, spoil: Callable[[Gateway], None], says: str) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    spoil(gateway)
    before = {path: path.stat().st_mtime_ns for path in gateway.directory.iterdir() if path.is_file()}
    assert says in run_fails(gateway)
    after = {path: path.stat().st_mtime_ns for path in gateway.directory.iterdir() if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    assert not (gateway.directory / "data" / "replica").exists()


def test_no_gateway_to_ask(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    for command in (("list-sessions",), ("kick-device", "d")):
        done = gateway.ctl(*command, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "gatewayctl run" in done.stderr
        assert len(done.stderr.splitlines()) == 1
