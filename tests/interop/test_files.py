"""Files of devices and the programs they are from: each takes what was exported, and means what was imported."""

import base64
import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.peers import Peer, gnutls_cli, program
from tests.support.psk_device import is_accepted
from tests.support.services import unused_port

HEX = "00112233445566778899aabbccddeeff"
TEXT_KEY = "twenty characters, ok"
FLEET = f"""\
identity,key
meter-1,{HEX}
long,{"0123456789abcdef" * 8}
spoken,{TEXT_KEY.encode().hex()}
"Zähler, 'ß' ☀",{"5a" * 32}
a b,{"a7" * 20}
urn:dev:1,{"11" * 32}
#1,{"22" * 32}
{"x" * 127},{"33" * 32}
"""

FILES = {
    "stunnel": f"""\
text:{TEXT_KEY}
hex:{HEX}
colons:{":".join(HEX[place : place + 2] for place in range(0, 32, 2))}
odd:{HEX}0
trailing:{HEX}\x20
leading: {HEX}
#hash:{HEX}
space :{HEX}

spaces in it:sixteen bytes ok
""",
    "mosquitto": f"""\
# a comment
plain:{HEX}
 leading:{HEX.upper()}
trailing : {HEX}

""",
}
"""What people may have in these files; each program says itself what it means."""


@contextlib.contextmanager
def stunnel(folder: Path, secrets: Path) -> Iterator[int]:
    port = unused_port()
    (folder / "conf").write_text(
        f"foreground = yes\npid =\n[psk]\naccept = 127.0.0.1:{port}\nconnect = 127.0.0.1:9\nciphers = PSK\n"
        f"PSKsecrets = {secrets}\n"
    )
    with Peer(program("stunnel4"), folder / "conf") as peer:
        peer.expect(r"Configuration successful")
        yield port


@contextlib.contextmanager
def mosquitto(folder: Path, secrets: Path) -> Iterator[int]:
    port = unused_port()
    (folder / "conf").write_text(
        f"listener {port} 127.0.0.1\npsk_file {secrets}\npsk_hint hint\nallow_anonymous true\nuser root\nlog_type all\n"
    )
    with Peer(program("mosquitto"), "-c", folder / "conf") as peer:
        peer.expect(r"mosquitto version .* running")
        yield port


SERVERS: dict[str, Callable[[Path, Path], contextlib.AbstractContextManager[int]]] = {
    "stunnel": stunnel,
    "mosquitto": mosquitto,
}


def gets_in(port: int, identity: str, key: str) -> bool:
    """Whether a TLS 1.2 handshake with this key succeeds."""
    address = ("-connect", f"127.0.0.1:{port}", "-tls1_2", "-brief")
    done = subprocess.run(
        [program("openssl"), "s_client", *address, "-psk_identity", identity, "-psk", key],
        input=b"",
        capture_output=True,
        timeout=10,
        check=False,
    )
    return b"CONNECTION ESTABLISHED" in done.stderr


def keys(gateway: Gateway, realm: str = "default") -> dict[str, str]:
    """Identity -> key in hex, of all credentials in a realm."""
    path = gateway.directory / "keys.jsonl"
    gateway.ctl("export-devices", "--format", "jsonl", "--realm", realm, "--with-keys", "--output", path)
    devices = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return {each["identity"]: each["key"] for device in devices for each in device["credentials"]}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    gateway = new_gateway(tmp_path_factory.mktemp("files") / "gateway")
    (gateway.directory / "fleet.csv").write_text(FLEET)
    gateway.ctl("import-devices", "--format", "csv", gateway.directory / "fleet.csv")
    for name in SERVERS:
        gateway.ctl("add-realm", name)
    return gateway


@pytest.mark.parametrize("name", SERVERS)
def test_an_exported_file_lets_the_devices_in(gateway: Gateway, tmp_path: Path, name: str) -> None:
    path = tmp_path / "secrets"
    shown = json.loads(
        gateway.ctl("export-devices", "--format", name, "--with-keys", "--output", path, "--json").stdout
    )
    wanted = keys(gateway)
    cannot = {"stunnel": {"urn:dev:1"}, "mosquitto": {"urn:dev:1", "#1"}}[name]
    assert shown["devices"] == len(wanted) - len(cannot)
    with SERVERS[name](tmp_path, path) as port:
        assert not gets_in(port, "meter-1", HEX[:-2] + "00")
        refused = {identity for identity, key in wanted.items() if not gets_in(port, identity, key)}
    assert refused == cannot


@pytest.mark.parametrize("name", SERVERS)
def test_an_imported_file_means_what_its_program_takes_it_for(
    gateway: Gateway, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "secrets"
    path.write_text(FILES[name])
    path.chmod(0o600)
    gateway.ctl("import-devices", path, "--format", name, "--realm", name)
    found = keys(gateway, name)
    assert len(found) == len([line for line in FILES[name].splitlines() if ":" in line])
    with SERVERS[name](tmp_path, path) as port:
        assert [identity for identity, key in found.items() if not gets_in(port, identity, key)] == []


def test_a_file_of_psktool_and_its_devices(gateway: Gateway, tmp_path: Path) -> None:
    """psktool makes the keys and writes names with a colon in hex; gnutls-cli connects as each of its users."""
    path = tmp_path / "keys.psk"
    users = ["psktool 1", "psktool:2", "Zähler"]
    for user in users:
        command = [program("psktool"), "--username", user, "--pskfile", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    assert "\n#70736b746f6f6c3a32:" in path.read_text()
    gateway.ctl("import-devices", path, "--format", "gnutls", "--group", "psktool")
    exported = tmp_path / "exported.psk"
    gateway.ctl(
        *("export-devices", "--format", "gnutls", "--group", "psktool", "--with-keys", "--output", exported)
    )
    assert exported.read_text() == path.read_text()
    found = keys(gateway)
    with running(gateway):
        for user in users:
            with gnutls_cli(gateway.port(), Device(user, found[user]), "NORMAL:+ECDHE-PSK:+PSK") as peer:
                peer.expect(r"^- Handshake was completed")
                peer.send("a line\n")
                peer.expect(r"^ok 1\n")


def test_a_running_gateway_lets_imported_devices_in_and_no_key_is_anywhere(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    path = tmp_path / "psk"
    devices = {f"m{number}": f"{number:02x}" + HEX[2:] for number in range(200)}
    path.write_text("".join(f"{identity}:{key}\n" for identity, key in devices.items()))
    with running(gateway):
        port = gateway.port()
        gateway.ctl("import-devices", path, "--format", "mosquitto")
        wait_for(lambda: is_accepted(port, "m199", devices["m199"]), 5, "an imported device that gets in")
        assert is_accepted(port, "m0", devices["m0"])
        assert not is_accepted(port, "m1", devices["m0"])
        path.write_text(f"m0:{devices['m1']}\n")
        gateway.ctl("import-devices", path, "--format", "mosquitto", "--on-conflict", "update")
        wait_for(lambda: is_accepted(port, "m0", devices["m1"]), 5, "a changed key that is known")
        assert not is_accepted(port, "m0", devices["m0"])
        assert gateway.complaints() == []
        places = [each for each in gateway.directory.rglob("*") if each.is_file()]
        contents = {str(place.relative_to(gateway.directory)): place.read_bytes() for place in places}
    contents["dump"] = dump(gateway.directory / "registry.db")
    for key in devices.values():
        raw = bytes.fromhex(key)
        for form in (raw, key.encode(), key.upper().encode(), base64.b64encode(raw).rstrip(b"=")):
            assert [name for name, content in contents.items() if form in content] == []
    assert any("data.mdb" in name for name in contents), "the replica was looked at"
    assert b"m199" in contents["dump"]


def dump(path: Path) -> bytes:
    connection = sqlite3.connect(path)
    try:
        return "\n".join(connection.iterdump()).encode()
    finally:
        connection.close()
