"""A gateway that cannot start says in one line what, where and what to do, exits with 1, and changes nothing."""

import contextlib
import re
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.gateway import Gateway, new_gateway, running

Damage = Callable[[Gateway], None]


def wrong_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").write_text("ab" * 32 + "\n")


def missing_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").unlink()


def readable_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").chmod(0o644)


def garbled_master_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").write_text("not hex\n")


def newer_schema(gateway: Gateway) -> None:
    _execute(gateway, "UPDATE alembic_version SET version_num = '9999'")
    _execute(gateway, "UPDATE feed SET compatible_from = '9999'")


def no_schema(gateway: Gateway) -> None:
    _execute(gateway, "DROP TABLE alembic_version")


def no_database(gateway: Gateway) -> None:
    (gateway.directory / "registry.db").write_bytes(b"this is no database\n" * 500)


def unknown_key(gateway: Gateway) -> None:
    gateway.config.write_text(gateway.config.read_text().replace("drain_s = 3", "drian_s = 3"))


def wrong_type(gateway: Gateway) -> None:
    gateway.config.write_text(gateway.config.read_text().replace("drain_s = 3", 'drain_s = "soon"'))


def no_configuration(gateway: Gateway) -> None:
    gateway.config.unlink()


def data_dir_is_a_file(gateway: Gateway) -> None:
    (gateway.directory / "data").write_text("in the way\n")


def _execute(gateway: Gateway, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(gateway.directory / "registry.db")) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (wrong_master_key, r"the master key .*master\.key does not open"),
        (missing_master_key, r"master\.key"),
        (readable_master_key, r"master\.key.*chmod 600"),
        (garbled_master_key, r"master\.key.*64 hex"),
        (newer_schema, r"schema 9999.*upgrade"),
        (no_schema, r"run `gatewayctl migrate`"),
        (no_database, r"registry\.db"),
        (data_dir_is_a_file, r"node\.data_dir"),
        (unknown_key, r"gateway\.toml.*node\.drian_s"),
        (wrong_type, r"gateway\.toml.*node\.drain_s"),
        (no_configuration, r"gateway\.toml"),
    ],
)
def test_a_start_that_cannot_work(tmp_path: Path, damage: Damage, says: str) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    damage(gateway)
    before = _tree(gateway.directory)
    check_refused(gateway, says)
    assert _tree(gateway.directory) == before


@pytest.mark.parametrize("key", ["listeners.tls.bind", "admin.bind"])
def test_a_port_that_is_in_use(tmp_path: Path, key: str) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _use_port(gateway, key, port)
        check_refused(
            gateway, rf"{re.escape(key)}: cannot listen on 127.0.0.1:{port}: Address already in use: choose"
        )


def test_a_port_that_another_gateway_would_share(tmp_path: Path) -> None:
    """SO_REUSEPORT would let both in, and each would get a part of the devices."""
    one, other = new_gateway(tmp_path / "one"), new_gateway(tmp_path / "other")
    with running(one):
        _use_port(other, "listeners.tls.bind", one.port())
        check_refused(other, r"listeners\.tls\.bind: cannot listen on")


def _use_port(gateway: Gateway, key: str, port: int) -> None:
    before = "[admin]\n" if key == "admin.bind" else 'name = "tls"\n'
    text = gateway.config.read_text()
    changed = text.replace(f'{before}bind = "127.0.0.1:0"', f'{before}bind = "127.0.0.1:{port}"')
    assert changed != text
    gateway.config.write_text(changed)


def test_a_data_dir_that_is_in_use(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    with running(gateway):
        check_refused(gateway, r"node\.data_dir: another gateway uses .*: stop it, or give")
        assert gateway.http("/readyz")[0] == 200


def check_refused(gateway: Gateway, says: str) -> None:
    """`run` ends with one line."""
    done = gateway.ctl("run", check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert re.search(says, done.stderr), done.stderr


def test_commands_for_a_gateway_that_does_not_run(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    for command in (("list-sessions", "--json"), ("kick-device", "d")):
        done = gateway.ctl(*command, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            r"error: .*control\.sock: no gateway answers there: start it with .*\n", done.stderr
        )


def test_commands_for_a_gateway_whose_socket_was_removed(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    with running(gateway):
        assert gateway.sessions() == []
        (gateway.directory / "data" / "control.sock").unlink()
        done = gateway.ctl("list-sessions", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"error: .*control\.sock: no gateway answers there.*\n", done.stderr)
        assert gateway.http("/readyz")[0] == 200


def _tree(directory: Path) -> dict[str, bytes]:
    """Every file and its content; what SQLite keeps beside its file comes and goes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
        if not path.name.endswith(("-wal", "-shm"))
    }
