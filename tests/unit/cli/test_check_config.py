import tomllib
from pathlib import Path

import pytest

from tests.support.commands import Run


def test_the_tree_in_force_is_printed_as_toml_and_json(run: Run, folder: Path) -> None:
    out = run("check-config").out
    tree = run("check-config", "--json").document

    assert out.startswith("# gateway.toml is valid.")
    assert tomllib.loads(out) == tree
    assert tree["node"]["data_dir"] == str(folder / "data")
    assert tree["limits"]["message_bytes_max"] == 65536


@pytest.mark.usefixtures("folder")
def test_secrets_are_masked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSKGW_REGISTRY__URL", "postgresql://u:hunter2@127.0.0.1/db")
    for arguments in ([], ["--json"]):
        out = run("check-config", *arguments).out
        assert "u:***@127.0.0.1" in out
        assert "hunter2" not in out


def test_the_configuration_is_found_by_option_and_environment(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("check-config", "--config", folder / "gateway.toml").out
    monkeypatch.setenv("PSKGW_CONFIG", str(folder / "gateway.toml"))
    assert run("check-config").out


def test_a_mistake_is_one_line_and_status_1(run: Run, folder: Path) -> None:
    text = (folder / "gateway.toml").read_text()
    (folder / "gateway.toml").write_text(text.replace("profile", "profle"))
    done = run("check-config", status=1)
    assert done.err == "error: gateway.toml: listeners[0].profle: unknown key, is profile meant?\n"
    assert done.out == ""


@pytest.mark.usefixtures("folder")
def test_a_missing_file_is_one_line_and_status_1(run: Run) -> None:
    assert "nope.toml does not exist" in run("check-config", "--config", "nope.toml", status=1).err
