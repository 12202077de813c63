"""Every client with every suite of the gateway, each alone: docs/devices/README.md has the table, this measures it."""

import contextlib
import dataclasses
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from gateway.tls.openssl import ClientContext, TlsVersion
from gateway.tls.profiles import DHE_PSK_SUITES, PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import ClientSession, Failed
from tests.interop.devices.conftest import Fleet
from tests.support.gateway import Device
from tests.support.recipes import Recipe, access_for, need_header, need_program, python313

README = Path(__file__).parents[3] / "docs" / "devices" / "README.md"
LISTENER = "everything"
SUITES = (
    *TLS13_SUITES["sha256"],
    *TLS13_SUITES["sha384"],
    *PROFILES[ProfileName.CONSTRAINED].tls12_suites,
    *DHE_PSK_SUITES,
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where a client is tried: a device for each hash, and a folder."""

    fleet: Fleet
    folder: Path
    devices: dict[str, Device]

    @property
    def port(self) -> int:
        return self.fleet.gateway.port(LISTENER)

    def device(self, suite: str) -> Device:
        """The device whose key fits a suite."""
        return self.devices["sha384" if suite in TLS13_SUITES["sha384"] else "sha256"]

    def recipe(self, name: str) -> Recipe:
        """A page's programs, compiled, with the keys of both devices."""
        recipe = Recipe(name, access_for(self.devices["sha256"], self.port), self.folder / name)
        for device in self.devices.values():
            (recipe.folder / f"{device.identity}.key").write_text(device.key)
        compiling = [line for line in recipe.commands.splitlines() if line.startswith("cc ")]
        if compiling:
            recipe.run(*compiling)
        return recipe

    def arguments(self, suite: str, name: str) -> str:
        """What the programs of the recipes take."""
        identity = self.device(suite).identity
        return shlex.join(["127.0.0.1", str(self.port), identity, f"{identity}.key", name])


Attempt = Callable[[str], None]
"""Connect with one suite. What it does when the client has no such suite is its own business."""
LINE = "{ echo 'reading 1'; sleep 0.3; } | "


def openssl(bench: Bench) -> Attempt:
    need_program("openssl")
    recipe = bench.recipe("openssl")

    def attempt(suite: str) -> None:
        device = bench.device(suite)
        chosen = ("-tls1_3 -ciphersuites " if is_tls13(suite) else "-tls1_2 -cipher @SECLEVEL=0:") + suite
        recipe.attempt(
            f"{LINE}openssl s_client -brief -connect 127.0.0.1:{bench.port} {chosen} "
            f"-psk_identity {device.identity} -psk {device.key}"
        )

    return attempt


def gnutls(bench: Bench) -> Attempt:
    need_program("gnutls-cli")
    recipe = bench.recipe("gnutls")

    def attempt(suite: str) -> None:
        device = bench.device(suite)
        recipe.attempt(
            f"{LINE}gnutls-cli --port {bench.port} --priority {gnutls_priority(suite)} "
            f"--pskusername {device.identity} --pskkey {device.key} 127.0.0.1"
        )

    return attempt


def gnutls_priority(suite: str) -> str:
    cipher = re.search(r"(AES)_?(128|256)[-_](GCM|CCM|CBC)(8?)|CHACHA20.POLY1305", suite)
    assert cipher
    name = (
        "CHACHA20-POLY1305"
        if cipher[1] is None
        else f"{cipher[1]}-{cipher[2]}-{cipher[3]}" + "-8" * bool(cipher[4])
    )
    if is_tls13(suite):
        return f"NORMAL:-VERS-ALL:+VERS-TLS1.3:-KX-ALL:+ECDHE-PSK:+PSK:-CIPHER-ALL:+{name}"
    exchange = re.sub("PSK.*", "PSK", suite)
    mac = suite.rpartition("-")[2] if "CBC" in suite else "AEAD"
    return f"NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+{exchange}:-CIPHER-ALL:+{name}:-MAC-ALL:+{mac}"


def program(page: str, command: str, rename: Callable[[str], str] = str) -> Callable[[Bench], Attempt]:
    """A recipe that is a program with the suite as its last argument."""

    def prepare(bench: Bench) -> Attempt:
        recipe = bench.recipe(page)
        return lambda suite: void(recipe.attempt(f"{command} {bench.arguments(suite, rename(suite))}"))

    return prepare


def void(_result: object) -> None:
    """Nothing is made of it: what counts is what the gateway saw."""


def mbedtls_name(suite: str) -> str:
    exchange, _, cipher = suite.partition("PSK-")
    cipher = cipher.replace("AES", "AES-").replace("CCM8", "CCM-8").replace("POLY1305", "POLY1305-SHA256")
    return f"TLS-{exchange}PSK-WITH-{cipher}"


def wolfssl_name(suite: str) -> str:
    if is_tls13(suite):
        return suite.replace("TLS_AES_", "TLS13-AES").replace("TLS_", "TLS13-").replace("_", "-")
    return suite.replace("CCM8", "CCM-8")


def mosquitto(bench: Bench) -> Attempt:
    need_program("mosquitto_pub")
    device = bench.fleet.add(NewDevice(identity="suites-mqtt", group="mqtt"))
    recipe = bench.recipe("mosquitto")

    def attempt(suite: str) -> None:
        # --ciphers is for TLS 1.2: in TLS 1.3 it offers what OpenSSL does, and the gateway chooses.
        version = "tlsv1.3" if is_tls13(suite) else "tlsv1.2"
        ciphers = "" if is_tls13(suite) else f"--ciphers {suite}:@SECLEVEL=0"
        recipe.attempt(
            f"mosquitto_pub --host 127.0.0.1 --port {bench.port} --psk-identity {device.identity} "
            f"--psk {device.key} --tls-version {version} {ciphers} --topic t --message m"
        )

    return attempt


def own_client(bench: Bench) -> Attempt:
    def attempt(suite: str) -> None:
        device = bench.device(suite)
        version = TlsVersion.TLS1_3 if is_tls13(suite) else TlsVersion.TLS1_2
        hash_name = "sha384" if suite in TLS13_SUITES["sha384"] else "sha256"
        context = ClientContext(
            () if is_tls13(suite) else (suite, "@SECLEVEL=0"),
            (suite,) if is_tls13(suite) else (),
            lowest=version,
            highest=version,
        )
        keys = (device.identity.encode(), bytes.fromhex(device.key), hash_name)
        client = ClientSession(context, lambda _hint: keys)
        with socket.create_connection(("127.0.0.1", bench.port), 10) as connection:
            connection.sendall(client.output())
            while not client.is_open:
                assert not any(isinstance(event, Failed) for event in client.receive(connection.recv(65536)))
                connection.sendall(client.output())
            client.send(b"reading 1\n")
            connection.sendall(client.output())
            answer = b""
            while not answer.endswith(b"\n"):
                events = client.receive(connection.recv(65536))
                answer += b"".join(event for event in events if isinstance(event, bytes))
            assert answer == b"ok 1\n"

    return attempt


def is_tls13(suite: str) -> bool:
    return suite.startswith("TLS_")


CLIENTS: dict[str, Callable[[Bench], Attempt]] = {
    "OpenSSL": openssl,
    "GnuTLS": gnutls,
    "Mbed TLS": program("mbedtls", "./device", mbedtls_name),
    "python-mbedtls": program("python-mbedtls", "python3 device.py", mbedtls_name),
    "wolfSSL": program("wolfssl", "./device", wolfssl_name),
    "Node.js": program("nodejs", "node device.js"),
    "Python 3.13": program("python", "python3.13 device.py"),
    "Mosquitto": mosquitto,
    "client library": own_client,
}
NEEDED: dict[str, Callable[[], object]] = {
    "Mbed TLS": lambda: need_header("mbedtls/ssl.h"),
    "python-mbedtls": lambda: pytest.importorskip("mbedtls"),
    "wolfSSL": lambda: need_header("wolfssl/ssl.h"),
    "Node.js": lambda: need_program("node"),
    "Python 3.13": python313,
}


@pytest.fixture(scope="module")
def both_hashes(devices: Fleet) -> dict[str, Device]:
    return {
        "sha256": devices.add(NewDevice(identity="suites-256")),
        "sha384": devices.add(NewDevice(identity="suites-384", hash="sha384")),
    }


@pytest.mark.parametrize("client", CLIENTS)
def test_the_table_of_suites(
    devices: Fleet, tmp_path: Path, both_hashes: dict[str, Device], client: str
) -> None:
    if client in NEEDED:
        NEEDED[client]()
    attempt = CLIENTS[client](Bench(devices, tmp_path, both_hashes))
    documented = table()[client]
    differs = {}
    with devices.broker(tmp_path) if client == "Mosquitto" else contextlib.nullcontext():
        for suite in SUITES:
            before = handshakes(devices, suite)
            attempt(suite)
            works = handshakes(devices, suite) > before
            if works != documented[suite]:
                differs[suite] = "works" if works else "does not work"
    assert not differs, f"{client} (update the table in {README.name}): {differs}"


def handshakes(devices: Fleet, suite: str) -> float:
    """How many ended well with this suite."""
    return devices.gateway.metric("pskgw_handshakes_total", listener=LISTENER, outcome="ok", cipher=suite)


def table() -> dict[str, dict[str, bool]]:
    """What the page says: by client and suite."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.read_text().splitlines()
        if line.startswith("| suite |") or re.match(r"\| `(TLS_|[A-Z]*-?PSK-)", line)
    ]
    (_, *clients), *lines = rows
    assert [line[0].strip("`") for line in lines] == list(SUITES)
    return {
        client: {line[0].strip("`"): line[1 + column] == "yes" for line in lines}
        for column, client in enumerate(clients)
    }


def test_every_client_has_its_column() -> None:
    assert list(table()) == list(CLIENTS)
