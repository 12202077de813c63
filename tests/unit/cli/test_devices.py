import datetime as dt
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Run

KEY = "00112233445566778899aabbccddeeff"


def devices(run: Run, *arguments: str) -> list[str]:
    return [device["device"] for device in run("list-devices", "--json", *arguments).document]


# add-device


@pytest.mark.usefixtures("folder")
def test_a_device_gets_a_random_key_that_is_shown_once(run: Run) -> None:
    first, second = (run("add-device", name, "--json").document for name in ("m1", "m2"))

    assert re.fullmatch(r"[0-9a-f]{64}", first["key"])
    assert first["key"] != second["key"]
    assert (first["realm"], first["device"], first["identity"], first["hint"]) == (
        "default",
        "m1",
        "m1",
        None,
    )
    assert first["key"] not in run("show-device", "m1", "--json").out
    assert first["key"] not in run("list-devices", "--json").out


@pytest.mark.usefixtures("folder")
def test_all_options_reach_the_registry(run: Run) -> None:
    run("add-realm", "plant", "--hint", "plant hint")
    added = run(
        *(
            "add-device",
            "m1",
            "--realm",
            "plant",
            "--group",
            "meters",
            "--label",
            "site=a=b",
            "--label",
            "n=1",
        ),
        *("--not-before", "2026-01-31", "--not-after", "2036-01-31T12:00:00+02:00"),
        *("--allow-from", "10.0.0.0/8", "--allow-from", "2001:db8::/32", "--json"),
    ).document
    shown = run("show-device", "m1", "--realm", "plant", "--json").document

    assert added["hint"] == "plant hint"
    for document in (added, shown):
        assert document["group"] == "meters"
        assert document["labels"] == {"n": "1", "site": "a=b"}
        assert document["allow_from"] == ["10.0.0.0/8", "2001:db8::/32"]
    (credential,) = shown["credentials"]
    for document in (added, credential):
        assert document["not_before"] == "2026-01-31T00:00:00Z"
        assert document["not_after"] == "2036-01-31T10:00:00Z"


@pytest.mark.usefixtures("folder")
def test_the_key_may_come_from_a_file_or_stdin(run: Run, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY.upper() + "\n")
    assert run("add-device", "m1", "--key-file", tmp_path / "key", "--json").document["key"] == KEY
    done = run("add-device", "m2", "--key-stdin", "--json", stdin=KEY.encode() + b"\r\n")
    assert done.document["key"] == KEY


@pytest.mark.usefixtures("folder")
def test_people_are_told_commands_to_try(run: Run, tmp_path: Path) -> None:
    out = run("add-device", "m 1").out
    key = re.search(r"^key +([0-9a-f]{64})$", out, re.MULTILINE)
    assert key
    address = "127.0.0.1:8883"
    assert f"openssl s_client -quiet -connect {address} -psk_identity 'm 1' -psk {key[1]}" in out
    assert f"PSKGW_KEY={key[1]} gatewayctl connect {address} --identity 'm 1'" in out

    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    out = run("add-device", "m2", "--key-file", key_file).out
    assert f"-psk $(cat {key_file})" in out
    assert f"gatewayctl connect {address} --identity m2 --key-file {key_file}" in out


def test_commands_fit_the_listener_that_serves_the_realm(run: Run, folder: Path) -> None:
    run("add-realm", "plant")
    done = run("add-device", "m1", "--realm", "plant")
    assert "openssl" not in done.out
    assert "warning: no listener serves the realm plant" in done.err

    configuration = folder / "gateway.toml"
    text = configuration.read_text().replace('"127.0.0.1:8883"', '"[::]:18883"')
    configuration.write_text(
        text.replace('realm = "default"', 'realms_by_sni = { "plant.example" = "plant" }')
    )
    done = run("add-device", "m2", "--realm", "plant")
    assert "-connect [::1]:18883" in done.out
    assert "-servername plant.example" in done.out
    assert done.err == ""


@pytest.mark.usefixtures("folder")
def test_what_small_clients_refuse_is_said_on_stderr(run: Run) -> None:
    assert run("add-device", "i" * 32, "--key-stdin", stdin=b"ab" * 32).err == ""
    done = run("add-device", "i" * 33, "--key-stdin", "--json", stdin=b"ab" * 33)
    assert done.document["key"] == "ab" * 33
    first, second = done.err.splitlines()
    assert first.startswith("warning: the identity has 33 bytes: tinydtls")
    assert second.startswith("warning: the key has 33 bytes: mbedTLS")


@pytest.mark.usefixtures("folder")
def test_a_qr_code_is_drawn(run: Run) -> None:
    assert "█" in run("add-device", "m1", "--qr").out


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("", "the identity is empty"),
        ("i" * 129, "the identity has 129 bytes"),
        ("ä" * 65, "the identity has 130 bytes"),
        ("a\nb", r"the identity 'a\nb' has control characters"),
        ("a\x85b", r"the identity 'a\x85b' has control characters"),
        ("a\udcffb", "the identity is not UTF-8"),
    ],
)
def test_an_identity_that_cannot_be_is_refused(run: Run, identity: str, message: str) -> None:
    assert message in run("add-device", identity, status=1).err
    assert devices(run) == []


@pytest.mark.usefixtures("folder")
def test_bytes_that_are_not_utf8_are_refused_as_the_system_passes_them() -> None:
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"gateway", b"add-device", b"a\xff"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"error: the identity is not UTF-8\n")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (b"", "the key has 0 bytes"),
        (b"ab" * 15, "the key has 15 bytes: 16 to 64"),
        (b"ab" * 65, "the key has 65 bytes: at most 64"),
        (b"abc", "the key is not hex"),
        (b"0x" + b"ab" * 16, "the key is not hex"),
        (b"\xff\xfe" * 16, "the key is not hex"),
        (b"ab" * 5000, "has more than 4096 bytes"),
    ],
)
def test_a_key_that_cannot_be_is_refused_and_not_repeated(run: Run, key: bytes, message: str) -> None:
    err = run("add-device", "m1", "--key-stdin", stdin=key, status=1).err
    assert message in err
    assert "abab" not in err
    assert devices(run) == []


@pytest.mark.usefixtures("folder")
def test_a_key_file_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in run("add-device", "m1", "--key-file", "nope", status=1).err
    assert "cannot be read: Is a directory" in run("add-device", "m1", "--key-file", tmp_path, status=1).err
    assert devices(run) == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--realm", "nope"], "realm 'nope' does not exist"),
        (["--group", ""], "a group has 1 to 64 characters"),
        (["--label", "a b=c"], "label 'a b': a label key has"),
        (["--allow-from", "everywhere"], "network 'everywhere' is not an address range"),
        (["--allow-from", "10.0.0.1/8"], "is 10.0.0.0/8 meant?"),
        (["--not-before", "2030-01-01", "--not-after", "2029-01-01"], "not-before must be earlier"),
    ],
)
def test_options_that_cannot_be_are_refused(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("add-device", "m1", *arguments, status=1).err
    assert devices(run) == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--label", "novalue"],
        ["--label", "a=1", "--label", "a=2"],
        ["--not-after", "soon"],
        ["--not-after", "2030-01-01T00:00:00"],
        ["--key-file", "f", "--key-stdin"],
        ["--qr", "--json"],
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(run: Run, arguments: list[str]) -> None:
    run("add-device", "m1", *arguments, status=2)
    assert devices(run) == []


@pytest.mark.usefixtures("folder")
def test_a_taken_identity_is_refused_in_its_realm_only(run: Run) -> None:
    run("add-device", "m1")
    assert "identity 'm1' is taken in realm 'default'" in run("add-device", "m1", status=1).err
    run("add-realm", "plant")
    run("add-device", "m1", "--realm", "plant")
    assert devices(run) == ["m1", "m1"]


# list-devices and show-device


@pytest.mark.usefixtures("folder")
def test_devices_are_filtered_and_paged(run: Run) -> None:
    run("add-realm", "plant")
    run("add-device", "a", "--group", "meters", "--label", "site=north")
    run("add-device", "b", "--group", "meters")
    run("add-device", "c", "--realm", "plant", "--label", "site=north")

    assert devices(run) == ["a", "b", "c"]
    assert devices(run, "--realm", "plant") == ["c"]
    assert devices(run, "--group", "meters") == ["a", "b"]
    assert devices(run, "--label", "site=north") == ["a", "c"]
    assert devices(run, "--label", "site=north", "--group", "meters") == ["a"]
    assert devices(run, "--group", "none") == []
    first = run("list-devices", "--json", "--limit", "2").document
    assert [device["device"] for device in first] == ["a", "b"]
    assert devices(run, "--after", str(first[-1]["id"])) == ["c"]
    assert "realm 'nope' does not exist" in run("list-devices", "--realm", "nope", status=1).err


@pytest.mark.usefixtures("folder")
def test_a_table_says_how_to_go_on(run: Run) -> None:
    for name in ("a", "b"):
        run("add-device", name)
    done = run("list-devices", "--limit", "1")
    header, row = done.out.splitlines()
    assert header.split() == ["REALM", "DEVICE", "GROUP", "STATE", "ADDED", "LABELS"]
    assert row.split()[:4] == ["default", "a", "-", "active"]
    assert done.err == "There are more devices: go on with --after 1.\n"
    assert run("list-devices", "--limit", "2").err == ""


@pytest.mark.usefixtures("folder")
def test_long_values_are_not_cut_off_tables(run: Run) -> None:
    run("add-device", "d" * 128, "--label", "note=" + "x" * 200)
    (_, row) = run("list-devices").out.splitlines()
    assert "d" * 128 in row
    assert "x" * 200 in row


@pytest.mark.usefixtures("folder")
def test_nothing_is_formatted_that_looks_like_markup(run: Run) -> None:
    run("add-device", "[red]m1[/red]")
    assert "[red]m1[/red]" in run("list-devices").out


@pytest.mark.usefixtures("folder")
def test_the_state_tells_why_a_device_would_be_refused(run: Run) -> None:
    run("add-device", "early", "--not-before", "2999-01-01")
    run("add-device", "late", "--not-after", "2001-01-01")
    run("add-device", "good")
    run("add-device", "off")
    run("disable-device", "off")
    states = {device["device"]: device["state"] for device in run("list-devices", "--json").document}
    assert states == {"early": "not_yet_valid", "late": "expired", "good": "active", "off": "disabled"}


@pytest.mark.usefixtures("folder")
def test_a_device_is_shown_for_people_and_scripts(run: Run) -> None:
    run("add-device", "m1", "--group", "meters", "--label", "site=north", "--allow-from", "10.0.0.0/8")
    shown = run("show-device", "m1", "--json").document
    assert shown["enabled"] is True
    assert dt.datetime.fromisoformat(shown["created_at"]).utcoffset() == dt.timedelta()
    assert [credential["identity"] for credential in shown["credentials"]] == ["m1"]

    out = run("show-device", "m1").out
    for text in ("meters", "site=north", "10.0.0.0/8", "IDENTITY"):
        assert text in out


# disable-device, enable-device, remove-device


@pytest.mark.usefixtures("folder")
def test_a_device_is_disabled_and_enabled(run: Run) -> None:
    run("add-device", "m1")
    assert run("disable-device", "m1").out == "Device m1 is disabled.\n"
    assert run("disable-device", "m1").out == "Device m1 was disabled already.\n"
    assert run("show-device", "m1", "--json").document["enabled"] is False
    assert run("enable-device", "m1").out == "Device m1 is enabled.\n"
    assert run("show-device", "m1", "--json").document["enabled"] is True


@pytest.mark.usefixtures("folder")
def test_a_removed_device_is_gone_and_may_be_added_again(run: Run) -> None:
    run("add-device", "m1")
    assert run("remove-device", "m1").out == "Removed device m1.\n"
    assert devices(run) == []
    run("add-device", "m1")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["show-device", "disable-device", "enable-device", "remove-device"])
def test_an_unknown_device_or_realm_is_refused(run: Run, command: str) -> None:
    assert "device 'nope' does not exist in realm 'default'" in run(command, "nope", status=1).err
    assert "realm 'nowhere' does not exist" in run(command, "nope", "--realm", "nowhere", status=1).err
