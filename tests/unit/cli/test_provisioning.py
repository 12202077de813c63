"""`add-device --for`, `--bundle` and `--hash`: what a device is given beside its key."""

import ast
import csv
import dataclasses
import json
import shlex
import stat
from pathlib import Path

import pytest
import segno
from hypothesis import given, strategies as st

from gateway.cli.bundle import c_header, c_text
from gateway.cli.recipes import EXAMPLE, blocks, recipe, recipe_names
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName
from tests.support.commands import Run

BUNDLE = ("device.json", "device.h", "device.csv")


@pytest.mark.usefixtures("folder")
def test_a_bundle_holds_what_the_device_needs(run: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "made" / "bundle"
    done = run("add-device", "meter, 7", "--bundle", bundle, "--host", "gw.example", "--json")
    assert done.err == "".join(f"Wrote {bundle / name}.\n" for name in BUNDLE)
    key = done.document["key"]
    suites = [*TLS13_SUITES["sha256"], *PROFILES[ProfileName.COMPATIBLE].tls12_suites]
    assert json.loads((bundle / "device.json").read_text()) == {
        "realm": "default",
        "device": "meter, 7",
        "identity": "meter, 7",
        "key": key,
        "host": "gw.example",
        "port": 8883,
        "server_name": None,
        "hint": None,
        "hash": "sha256",
        "suites": suites,
    }
    with (bundle / "device.csv").open(newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["pskgw", "host", "port", "identity", "key", "suites"]
    assert (rows["pskgw"]["type"], rows["identity"]["value"]) == ("namespace", "meter, 7")
    assert (rows["key"]["encoding"], rows["key"]["value"]) == ("hex2bin", key)
    assert (rows["port"]["encoding"], rows["port"]["value"]) == ("u16", "8883")
    assert all(len(name) <= 15 for name in rows), "NVS takes no longer keys"
    header = (bundle / "device.h").read_text()
    assert '#define PSKGW_IDENTITY "meter, 7"\n' in header
    assert "#define PSKGW_KEY_BYTES 32\n" in header
    assert "0x00A8" in header
    for name in BUNDLE:
        assert stat.S_IMODE((bundle / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o700


@pytest.mark.usefixtures("folder")
def test_nothing_is_added_when_the_bundle_cannot_be_written(run: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    run("add-device", "first", "--bundle", bundle)
    before = (bundle / "device.json").read_text()
    assert "device.json is there already" in run("add-device", "second", "--bundle", bundle, status=1).err
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    assert "cannot be made" in run("add-device", "second", "--bundle", in_the_way / "x", status=1).err
    run("add-realm", "unserved")
    for option in (("--bundle", tmp_path / "other"), ("--for", "openssl")):
        refused = run("add-device", "second", "--realm", "unserved", *option, status=1)
        assert "no listener serves the realm unserved" in refused.err
    assert not (tmp_path / "other").exists()
    assert "there is one for " in run("add-device", "second", "--for", "abacus", status=2).err
    assert (bundle / "device.json").read_text() == before
    assert [device["device"] for device in run("list-devices", "--json").document] == ["first"]


def test_a_realm_behind_a_server_name_is_reached_by_it(run: Run, folder: Path, tmp_path: Path) -> None:
    settings = folder / "gateway.toml"
    settings.write_text(
        settings.read_text().replace(
            "[[listeners]]\n", '[[listeners]]\nrealms_by_sni = { "plant.example" = "plant" }\n'
        )
    )
    run("add-realm", "plant", "--hint", "plant hint")
    run("add-device", "m", "--realm", "plant", "--bundle", tmp_path / "b")
    document = json.loads((tmp_path / "b" / "device.json").read_text())
    assert (document["host"], document["server_name"], document["hint"]) == (
        "plant.example",
        "plant.example",
        "plant hint",
    )
    header = (tmp_path / "b" / "device.h").read_text()
    assert '#define PSKGW_SERVER_NAME "plant.example"\n#define PSKGW_HINT "plant hint"\n' in header


def test_a_listener_on_every_address_is_reached_by_the_nodes_name(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    settings = folder / "gateway.toml"
    text = settings.read_text().replace("127.0.0.1:8883", "0.0.0.0:8883")
    settings.write_text(text.replace("[node]\n", '[node]\nname = "node-1"\n'))
    run("add-device", "m", "--bundle", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "device.json").read_text())["host"] == "node-1"


@pytest.mark.usefixtures("folder")
def test_the_recipe_is_for_this_device(run: Run) -> None:
    document = run("add-device", "it's 7", "--for", "openssl", "--json").document
    assert "-connect 127.0.0.1:8883 " in document["recipe"]
    assert f"-psk_identity {shlex.quote(chr(39).join(('it', 's 7')))}" in document["recipe"]
    assert f"echo {document['key']} >device.key" in document["recipe"]
    shown = run("add-device", "8", "--for", "zephyr").out
    assert '#define PSKGW_IDENTITY "8"' in shown
    assert EXAMPLE.identity not in shown


@pytest.mark.usefixtures("folder")
def test_the_provisioning_code_has_the_address(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    make_qr = segno.make_qr

    def remember(content: str) -> object:
        drawn.append(content)
        return make_qr(content)

    monkeypatch.setattr(segno, "make_qr", remember)
    run("add-device", "m1", "--qr", "--host", "gw.example")
    run("add-realm", "unserved", "--hint", "a hint")
    run("add-device", "m2", "--realm", "unserved", "--qr")
    codes = [json.loads(content) for content in drawn]
    assert [sorted(code) for code in codes] == [
        ["host", "identity", "key", "port"],
        ["hint", "identity", "key"],
    ]
    assert (codes[0]["host"], codes[0]["port"], codes[1]["hint"]) == ("gw.example", 8883, "a hint")


@pytest.mark.usefixtures("folder")
def test_a_key_is_bound_to_the_hash_that_is_named(run: Run, tmp_path: Path) -> None:
    added = run("add-device", "d", "--hash", "sha384", "--bundle", tmp_path / "b", "--json").document
    assert added["hash"] == "sha384"
    assert run("show-device", "d", "--json").document["credentials"][0]["hash"] == "sha384"
    suites = json.loads((tmp_path / "b" / "device.json").read_text())["suites"]
    assert suites[0] == "TLS_AES_256_GCM_SHA384"
    assert "TLS_AES_128_GCM_SHA256" not in suites
    run("add-device", "e", "--hash", "md5", status=2)


@given(st.text())
def test_any_text_stands_in_a_c_string(text: str) -> None:
    inside = c_text(text)
    assert inside.isascii()
    assert "??" not in inside, "a trigraph"
    assert ast.literal_eval(f'b"{inside}"') == text.encode()


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_no_identity_breaks_out_of_a_page(identity: str) -> None:
    access = dataclasses.replace(EXAMPLE, identity=identity)
    for name in recipe_names():
        pairs = list(zip(blocks(recipe(name, EXAMPLE)), blocks(recipe(name, access)), strict=True))
        assert all((before.language, before.file) == (after.language, after.file) for before, after in pairs)
        for before, after in pairs:
            if before.language == "sh" and EXAMPLE.identity in before.text:
                assert identity in shlex.split(after.text)


def test_the_header_of_the_example_names_its_key_once() -> None:
    assert c_header(EXAMPLE).count("0x00, 0x11") == 2  # the key repeats itself
