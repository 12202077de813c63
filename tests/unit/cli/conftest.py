"""The command line in this process, on a registry in SQLite."""

import io
import shutil
import sys
from pathlib import Path

import pytest

from gateway.cli import main
from tests.support.commands import Done, Run


class Stdin(io.TextIOWrapper):
    """Bytes on stdin, from no terminal."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run gatewayctl with these arguments; fails unless the exit status is the one expected."""
    monkeypatch.delenv("PSKGW_CONFIG", raising=False)

    def run(*arguments: object, stdin: bytes = b"", status: int = 0) -> Done:
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        done = Done(exited.value.code, *capsys.readouterr())
        assert (done.status or 0) == status, f"{arguments}: {done}"
        if status == 1:
            assert done.err.startswith("error: ")
            assert done.err.count("\n") == 1
            assert "Traceback" not in done.err
        return done

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `gatewayctl init` makes."""
    folder = tmp_path_factory.mktemp("made") / "gateway"
    with pytest.raises(SystemExit) as exited:
        main(["init", str(folder)])
    assert not exited.value.code
    return folder


@pytest.fixture
def folder(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder as `init` makes it, and the working folder."""
    copy = Path(shutil.copytree(made_once, tmp_path / "gateway"))
    monkeypatch.chdir(copy)
    return copy
