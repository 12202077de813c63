"""rotate-key, revoke-key, update-device, reseal-keys, audit-log and the realms' own: what they print and refuse."""

import re
from pathlib import Path

import pytest

from tests.support.commands import Run

pytestmark = pytest.mark.usefixtures("folder")
KEY = "00112233445566778899aabbccddeeff"


def test_a_rotated_key_is_shown_once(run: Run) -> None:
    run("add-device", "m")
    document = run("rotate-key", "m", "--json").document
    assert list(document) == ["realm", "device", "identity", "key", "hint", "not_after", "old"]
    assert (document["identity"], len(document["key"])) == ("m.2", 64)
    assert document["old"][0]["identity"] == "m"
    out = run(
        "rotate-key", "m", "--grace", "0s", "--identity", "m-new", "--key-stdin", stdin=KEY.encode()
    ).out
    assert KEY in out
    assert "The key is not shown again." in out
    shown = run("show-device", "m", "--json").document
    assert [each["state"] for each in shown["credentials"]] == ["expired", "expired", "active"]
    assert KEY not in run("show-device", "m").out


@pytest.mark.parametrize("grace", ["30", "d", "-1d", "1.5h", "1w", "", "\u0663d"])
def test_a_grace_time_has_a_number_and_a_unit(run: Run, grace: str) -> None:
    assert "is not a duration" in run("rotate-key", "m", f"--grace={grace}", status=2).err.replace("\n", " ")


def test_a_shared_key_is_warned_of(run: Run) -> None:
    assert "warning" not in run("add-device", "a", "--key-stdin", stdin=KEY.encode()).err
    warning = "warning: the same key is that of default/a: give every device"
    assert warning in run("add-device", "b", "--key-stdin", stdin=KEY.encode()).err
    warning = "warning: the same key is that of default/a, default/b: give every device"
    assert warning in run("rotate-key", "b", "--key-stdin", "--json", stdin=KEY.encode()).err


def test_revoking_says_whose_it_was(run: Run) -> None:
    run("add-device", "m")
    assert run("revoke-key", "m").out == "Revoked m of device m.\n"
    assert run("revoke-key", "m").out == "m was revoked already.\n"
    assert "identity 'x' does not exist" in run("revoke-key", "x", status=1).err


def test_a_device_is_changed_and_shown(run: Run) -> None:
    run("add-device", "m", "--group", "g", "--label", "a=1", "--not-after", "2099-01-01")
    changed = run(
        "update-device", "m", "--no-group", "--no-label", "a", "--label", "b=2",
        "--allow-from", "10.0.0.0/8", "--no-not-after", "--not-before", "2020-01-01", "--json",
    ).document  # fmt: skip
    assert (changed["group"], changed["labels"], changed["allow_from"]) == (None, {"b": "2"}, ["10.0.0.0/8"])
    assert changed["credentials"][0]["not_before"] == "2020-01-01T00:00:00Z"
    assert run("update-device", "m", "--no-group").out == "Device m was so already.\n"
    assert run("update-device", "m", "--allow-from-anywhere").out == "Changed device m.\n"
    conflict = run("update-device", "m", "--not-after", "2019-01-01", status=1)
    assert conflict.err == "error: not-before must be earlier than not-after\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("update-device", "m"),
        ("update-device", "m", "--group", "g", "--no-group"),
        ("update-device", "m", "--allow-from", "10.0.0.0/8", "--allow-from-anywhere"),
        ("update-device", "m", "--not-after", "soon"),
        ("update-realm", "default"),
        ("update-realm", "default", "--hint", "h", "--no-hint"),
        ("update-realm", "default", "--record-bytes-max", "512", "--no-record-bytes-max"),
        ("update-realm", "default", "--sessions-per-device", "0", "--no-sessions-per-device"),
        ("add-realm", "r", "--key-source", "else"),
        ("audit-log", "--head", "1-00"),
        ("list-devices", "--idle", "-1"),
    ],
)
def test_wrong_usage_is_told(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments, status=2).err


def test_realms_are_shown_changed_and_removed(run: Run) -> None:
    added = run("add-realm", "f", "--key-source", "derived-hkdf", "--enroll", "first-use", "--json").document
    assert re.fullmatch("[0-9a-f]{64}", added["secret"])
    shown = run("show-realm", "f", "--json").document
    assert shown | {"created_at": ""} == {
        "realm": "f", "hint": None, "key_source": "derived-hkdf", "enroll": "first-use", "idle_days": None,
        "sessions_per_device": None, "record_bytes_max": None, "created_at": "", "devices": 0,
    }  # fmt: skip
    assert added["secret"] not in run("show-realm", "f").out
    assert run("update-realm", "f", "--idle-days", "30", "--json").document["idle_days"] == 30
    bounded = run("update-realm", "f", "--record-bytes-max", "512", "--json").document
    assert (bounded["record_bytes_max"], bounded["idle_days"]) == (512, 30)
    assert "records of 63 bytes" in run("update-realm", "f", "--record-bytes-max", "63", status=1).err
    unbounded = run("update-realm", "f", "--no-record-bytes-max", "--json").document
    assert unbounded["record_bytes_max"] is None
    run("add-device", "d", "--realm", "f")
    assert "realm 'f' has 1 device" in run("remove-realm", "f", status=1).err
    assert run("remove-realm", "f", "--with-devices").out == "Removed realm f with its device.\n"
    assert "realm 'f' does not exist" in run("show-realm", "f", status=1).err


def test_a_secret_that_is_given_is_not_shown(run: Run, folder: Path) -> None:
    (folder / "secret").write_text("ab" * 32)
    done = run("add-realm", "f", "--key-source", "derived-hmac", "--secret-file", "secret")
    assert "ab" * 32 not in done.out
    assert (
        "whose keys are stored has no secret"
        in run("add-realm", "g", "--secret-file", "secret", status=1).err
    )
    key = run("add-device", "d", "--realm", "f", "--json").document["key"]
    assert len(key) == 64
    assert (
        "give no key"
        in run("add-device", "e", "--realm", "f", "--key-stdin", stdin=KEY.encode(), status=1).err
    )


def test_keys_are_resealed_and_the_old_master_key_is_no_more_needed(run: Run, folder: Path) -> None:
    run("add-device", "m")
    master = folder / "master.key"
    old = master.read_text()
    master.write_text("cd" * 32 + "\n" + old)
    assert run("reseal-keys", "--json").document == {"credentials": 1, "resealed": 4}
    assert "Sealed 0 keys anew." in run("reseal-keys").out
    master.write_text("cd" * 32)
    run("rotate-key", "m")
    master.write_text(old)
    assert "does not open this registry" in run("rotate-key", "m", status=1).err


def test_the_audit_is_shown_and_checked(run: Run, folder: Path) -> None:
    run("add-device", "m")
    run("revoke-key", "m")
    rows = run("audit-log", "--json").document
    assert [row["action"] for row in rows] == ["add-realm", "add-device", "revoke-key"]
    assert rows[2]["detail"] == {"identity": "m"}
    table = run("audit-log", "--subject", "default/m", "--limit", "1").out.splitlines()
    assert table[0].split() == ["TIME", "USER", "FROM", "ACTION", "SUBJECT", "DETAIL"]
    assert len(table) == 2
    head = run("audit-log", "--verify", "--json").document["head"]
    assert head in run("audit-log", "--verify", "--head", head).out

    import sqlite3

    with sqlite3.connect(folder / "registry.db") as connection:
        connection.execute("UPDATE audit SET actor = 'mallory' WHERE sequence = 2")
    connection.close()
    found = run("audit-log", "--verify", status=1)
    assert "row 2 was changed" in found.err
    assert run("audit-log", "--verify", "--json", status=1).document["faults"]
    assert "is no head of the audit" in run("audit-log", "--verify", "--head", "x", status=1).err


def test_a_registry_that_is_away_is_said_to_be(run: Run, folder: Path) -> None:
    (folder / "registry.db").rename(folder / "gone.db")
    for command in (["revoke-key", "m"], ["audit-log"], ["show-realm", "default"], ["reseal-keys"]):
        assert "is away" in run(*command, status=1).err


def test_expiring_and_idle_devices_are_listed(run: Run) -> None:
    run("add-device", "a")
    run("rotate-key", "a", "--grace", "5d")
    run("add-device", "b")
    assert [each["device"] for each in run("list-devices", "--expiring", "7", "--json").document] == ["a"]
    assert run("list-devices", "--expiring", "3", "--json").document == []
    assert run("list-devices", "--idle", "1", "--json").document == []
    assert len(run("list-devices", "--idle", "0", "--json").document) == 2
