import os
import sqlite3
import stat
from pathlib import Path

import pytest

from gateway.config import load
from gateway.errors import RegistryUnavailable
from tests.support.commands import Run


def listing(folder: Path) -> list[tuple[str, bytes]]:
    """Names and contents of all files of a folder."""
    return sorted((path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_init_writes_what_run_needs(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "gateway"
    out = run("init", folder).out

    assert {path.name for path in folder.iterdir()} >= {"gateway.toml", "master.key", "registry.db"}
    assert f"gatewayctl run --config {folder}/gateway.toml" in out
    assert [mode(folder / name) for name in ("master.key", "registry.db", "gateway.toml")] == [0o600] * 3
    settings = load(folder / "gateway.toml", {})
    (listener,), (route,) = settings.listeners, settings.routes
    assert listener.realm == "default"
    assert (route.framing, route.ack, route.content_type) == ("lines", True, "text/plain")
    assert settings.backends[route.backend].kind == "file"
    run("check-config", "--config", folder / "gateway.toml")


@pytest.mark.usefixtures("folder")
def test_init_makes_the_realm_default_and_no_device(run: Run) -> None:
    assert [realm["realm"] for realm in run("list-realms", "--json").document] == ["default"]
    assert run("list-devices", "--json").document == []


def test_two_inits_make_different_keys(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("init", tmp_path / name)
    assert (tmp_path / "a" / "master.key").read_bytes() != (tmp_path / "b" / "master.key").read_bytes()


@pytest.mark.parametrize("name", ["gateway.toml", "master.key", "registry.db"])
def test_init_overwrites_nothing(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    before = listing(tmp_path)
    err = run("init", tmp_path, status=1).err
    assert f"{tmp_path / name} is there already: nothing was changed" in err
    assert listing(tmp_path) == before


def test_init_leaves_other_files_of_the_folder_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run("init", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_init_that_fails_half_way_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise RegistryUnavailable("the disk is full")

    monkeypatch.setattr("gateway.registry.founding.initialise", fail)
    run("init", tmp_path / "new", status=1)
    assert list(tmp_path.iterdir()) == []


def test_init_where_no_folder_can_be_says_why(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file cannot be made: File exists" in run("init", tmp_path / "file", status=1).err
    assert "cannot be made: Not a directory" in run("init", tmp_path / "file" / "deeper", status=1).err


@pytest.mark.usefixtures("folder")
def test_migrate_is_repeatable(run: Run) -> None:
    assert run("migrate").out.startswith("The registry has schema ")
    assert run("migrate").out == run("migrate").out


def test_migrate_makes_a_registry_out_of_nothing(run: Run, folder: Path) -> None:
    (folder / "registry.db").unlink()
    assert "and the realm `default`" in run("migrate").out
    assert [realm["realm"] for realm in run("list-realms", "--json").document] == ["default"]


def test_a_missing_registry_says_how_to_make_it(run: Run, folder: Path) -> None:
    (folder / "registry.db").unlink()
    assert "does not exist, `gatewayctl migrate` makes it" in run("list-realms", status=1).err
    assert not (folder / "registry.db").exists()


def test_a_schema_that_this_program_does_not_know_is_refused(run: Run, folder: Path) -> None:
    with sqlite3.connect(folder / "registry.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("UPDATE feed SET compatible_from = '9999'")
    connection.close()
    for command in (["list-realms"], ["add-device", "d"], ["migrate"]):
        assert "upgrade this program" in run(*command, status=1).err


def test_a_missing_or_open_master_key_is_refused(run: Run, folder: Path) -> None:
    key = folder / "master.key"
    key.chmod(0o640)
    assert f"run `chmod 600 {key}`" in run("add-device", "d", status=1).err
    key.unlink()
    assert f"master key file {key} does not exist" in run("add-device", "d", status=1).err


def test_another_master_key_does_not_open_the_registry(run: Run, folder: Path) -> None:
    other = folder / "other.key"
    with os.fdopen(os.open(other, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write("00" * 32)
    (folder / "gateway.toml").write_text(
        (folder / "gateway.toml").read_text().replace("master.key", "other.key")
    )
    err = run("add-device", "d", status=1).err
    assert f"the master key in {other} does not open this registry" in err


@pytest.mark.usefixtures("folder")
def test_a_registry_that_is_away_fails_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSKGW_REGISTRY__URL", "postgresql://u:hunter2@127.0.0.1:1/db")
    err = run("list-devices", status=1).err
    assert "Connection refused" in err
    assert "hunter2" not in err
