"""import-devices and export-devices as people and scripts see them."""

import json
import os
from pathlib import Path

import pytest

from gateway.registry import importing
from tests.support.commands import Run

KEY = "ab" * 16


@pytest.fixture
def psk(folder: Path) -> Path:
    path = folder / "psk"
    path.write_text(f"# devices\nm1:{KEY}\nm2:{KEY}\n\nm3:{'cd' * 16}\n")
    return path


def test_an_import(run: Run, psk: Path) -> None:
    done = run("import-devices", psk, "--format", "mosquitto", "--group", "g", "--label", "a=b")
    assert done.out == f"Imported {psk} into realm default: 3 added.\n"
    assert done.err == (
        "warning: 2 of the imported keys are those of other credentials too, such as default/m1 and default/m2: "
        "a key belongs to one device and one identity\n"
    )
    listed = run("list-devices", "--json").document
    assert [(each["device"], each["group"], each["labels"]) for each in listed] == [
        ("m1", "g", {"a": "b"}),
        ("m2", "g", {"a": "b"}),
        ("m3", "g", {"a": "b"}),
    ]


def test_what_would_change(run: Run, psk: Path) -> None:
    run("add-device", "m2")
    arguments = ("import-devices", psk, "--format", "mosquitto", "--dry-run")
    done = run(*arguments, "--on-conflict", "update")
    assert done.out.splitlines() == [
        "line 2: add m1",
        "line 3: update m2: key",
        "line 5: add m3",
        "2 to add, 1 to update, 0 unchanged, 0 skipped, 0 imported before, 0 ignored, 0 bad",
    ]
    document = run(*arguments, "--on-conflict", "skip", "--json").document
    assert document["lines"][1] == {"line": 3, "verdict": "skip", "text": "m2"}
    assert (document["to_add"], document["skipped"], document["bad"]) == (2, 1, 0)
    assert len(run("list-devices", "--json").document) == 1, "nothing is written"


def test_every_bad_line_is_listed_and_nothing_is_imported(run: Run, psk: Path) -> None:
    psk.write_bytes(psk.read_bytes() + b"m1:" + KEY.encode() + b"\nm\xe4:00\nm6:zz\n")
    done = run("import-devices", psk, "--format", "mosquitto", status=1)
    assert done.err == (
        f"error: {psk} line 6: device 'm1' is in the file already: lines of one device follow each other "
        "(2 more bad lines: --dry-run shows all); nothing was imported\n"
    )
    done = run("import-devices", psk, "--format", "mosquitto", "--dry-run", status=1)
    assert [line for line in done.out.splitlines() if ": bad " in line] == [
        "line 6: bad device 'm1' is in the file already: lines of one device follow each other",
        "line 7: bad the line is not UTF-8",
        "line 8: bad the key is not hex: give an even number of the digits 0-9 and a-f",
    ]
    assert done.err == "error: 3 bad lines: repair or take them out, nothing would be imported\n"
    done = run("import-devices", psk, "--format", "mosquitto", "--dry-run", "--json", status=1)
    assert [each["line"] for each in json.loads(done.out)["lines"]] == [2, 3, 5, 6, 7, 8]
    assert run("list-devices", "--json").document == []


def test_an_empty_file(run: Run, psk: Path) -> None:
    psk.write_text("")
    assert run("import-devices", psk, "--format", "mosquitto").out.endswith(": it has no device.\n")
    document = run("import-devices", psk, "--format", "mosquitto", "--dry-run", "--json").document
    assert document["lines"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "--format", "csv"), "none cannot be read: No such file or directory"),
        (
            ("psk", "--format", "mosquitto", "--realm", "x"),
            "realm 'x' does not exist: `gatewayctl list-realms`",
        ),
        (("psk", "--format", "mosquitto", "--group", ""), "a group has 1 to 64 characters"),
        (("psk", "--format", "csv"), "psk line 1: the first line names the columns"),
        (("/dev/zero", "--format", "csv"), "/dev/zero is no regular file"),
        (("gateway.toml", "--format", "jsonl"), "gateway.toml line 1: the line is no JSON"),
        (("registry.db", "--format", "mosquitto"), "registry.db is no text but a binary file, see line 1"),
    ],
)
@pytest.mark.usefixtures("psk")
def test_what_cannot_be_imported_is_said_in_one_line(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    assert run("import-devices", *arguments, status=1).err.startswith(f"error: {message}")


def test_a_wrong_master_key(run: Run, psk: Path, folder: Path) -> None:
    key = folder / "master.key"
    key.write_text("00" * 32)
    assert "master" in run("import-devices", psk, "--format", "mosquitto", status=1).err
    assert (
        "master"
        in run("export-devices", "--format", "csv", "--output", folder / "out", "--with-keys", status=1).err
    )
    assert not (folder / "out").exists()


def test_conflicting_windows(run: Run, psk: Path) -> None:
    psk.write_text(f"identity,key,not_before,not_after\na,{KEY},2031-01-01,2030-01-01\n")
    done = run("import-devices", psk, "--format", "csv", status=1)
    assert "line 2: not-before must be earlier than not-after" in done.err
    run("add-device", "b", "--not-after", "2030-01-01")
    psk.write_text("identity,not_before\nb,2031-01-01\n")
    done = run("import-devices", psk, "--format", "csv", "--on-conflict", "update", status=1)
    assert "line 2: not-before must be earlier than not-after" in done.err


def test_interrupted_by_the_keyboard(run: Run, psk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_CREDENTIALS_PER_CHUNK", 1)
    written: list[int] = []
    write = importing.Importer._write_chunk

    def interrupted(*args: object, **kwargs: object) -> object:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        return write(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they are

    with monkeypatch.context() as patched:
        patched.setattr(importing.Importer, "_write_chunk", interrupted)
        done = run("import-devices", psk, "--format", "mosquitto", status=130)
    assert done.err == "error: interrupted: the same command goes on where it was\n"
    assert len(run("list-devices", "--json").document) == 2
    document = run("import-devices", psk, "--format", "mosquitto", "--json").document
    assert (document["imported_before"], document["added"]) == (2, 1)


def test_an_export(run: Run, psk: Path, folder: Path) -> None:
    run("import-devices", psk, "--format", "mosquitto", "--group", "g")
    run("add-device", "other:1", "--group", "h")
    done = run("export-devices", "--format", "mosquitto", "--output", "out", "--with-keys")
    assert done.out == "Wrote 3 credentials of 3 devices to out.\n"
    assert done.err.splitlines() == [
        "warning: 1 credentials were left out: a colon in the identity",
        "warning: of 3 devices the format cannot say: group",
    ]
    assert (folder / "out").read_text() == f"m1:{KEY}\nm2:{KEY}\nm3:{'cd' * 16}\n"
    document = run("export-devices", "--format", "csv", "--output", "out", "--group", "h", "--json").document
    assert document == {"output": "out", "devices": 1, "credentials": 1, "left_out": {}, "unsaid": {}}
    done = run("export-devices", "--format", "gnutls", "--output", "out", status=1)
    assert done.err == "error: a file of gnutls is made of keys: give --with-keys to export them\n"


def test_an_export_that_is_done_survives_a_loss_of_power(
    run: Run, psk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and then, with its name in it, the folder."""
    run("import-devices", psk, "--format", "mosquitto")
    synced: list[str] = []

    def record(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        synced.append(f"{name}, out is there" if (folder / "out").exists() else name)

    # What is asked of the disk shows in no other way, short of a loss of power.
    monkeypatch.setattr(os, "fsync", record)
    run("export-devices", "--format", "mosquitto", "--output", "out", "--with-keys")
    assert synced[0].startswith(".out.")
    assert synced[1:] == [f"{folder.name}, out is there"]
