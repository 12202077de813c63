"""`gatewayctl connect` against real gateways, and against what stands in its place when something is wrong."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.registry.sealing import Key
from gateway.registry.store import NewDevice
from tests.integration.device.conftest import Start, accepts, free_port, key_file, need, private
from tests.support.gateway import Device, Gateway, gatewayctl, new_gateway, running, wait_for

DEVICE = Device("meter-7", bytes(range(32)).hex())
OTHER = Device("m7", bytes(range(32, 64)).hex())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Realm `north`, with a hint of that name."""
    gateway = new_gateway(tmp_path_factory.mktemp("connect") / "gateway", listener='realm = "north"')
    gateway.ctl("add-realm", "north", "--hint", "north")
    gateway.add_devices(
        NewDevice(identity=DEVICE.identity, realm="north", key=Key(bytes.fromhex(DEVICE.key)))
    )
    with running(gateway):
        yield gateway


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return key_file(tmp_path, DEVICE)


def connect(
    port: int, *arguments: object, lines: str = "", identity: str = "meter-7"
) -> "subprocess.CompletedProcess[str]":
    return gatewayctl(
        "connect", f"127.0.0.1:{port}", "--identity", identity, *arguments, input=lines, check=False
    )


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line that a failure is told in."""
    assert done.returncode == 1, done
    errors = [line for line in done.stderr.splitlines() if not line.startswith("connected to ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.parametrize(("tls", "hint"), [("1.2", ", hint north"), ("1.3", "")])
def test_lines_are_acknowledged(gateway: Gateway, key: Path, tls: str, hint: str) -> None:
    done = connect(gateway.port(), "--key-file", key, "--tls", tls, "--hint", "north", lines="21.5\n21.6\n")
    assert (done.returncode, done.stdout) == (0, "ok 1\nok 2\n")
    assert re.fullmatch(
        rf"connected to 127\.0\.0\.1:{gateway.port()}: TLSv{tls}, [A-Z0-9_-]+{hint}\n", done.stderr
    )


def test_the_key_may_be_the_first_line_of_stdin(gateway: Gateway) -> None:
    done = connect(gateway.port(), "--key-file", "-", lines=f"{DEVICE.key}\n21.5\n")
    assert (done.returncode, done.stdout) == (0, "ok 1\n")


@pytest.mark.parametrize(
    ("tls", "messages"),
    [
        (
            "1.2",
            "> ClientHello < ServerHello < ServerKeyExchange < ServerHelloDone > ClientKeyExchange > Finished < Finished",
        ),
        ("1.3", "> ClientHello < ServerHello < EncryptedExtensions < Finished > Finished"),
    ],
)
def test_a_trace_shows_the_handshake(gateway: Gateway, key: Path, tls: str, messages: str) -> None:
    done = connect(gateway.port(), "--key-file", key, "--tls", tls, "--trace")
    assert done.returncode == 0
    shown = re.findall(
        r"^(>|<)\1\1 TLS 1\.\d, Handshake \[length [0-9a-f]{4}\], (\w+)$", done.stderr, re.MULTILINE
    )
    said = " ".join(f"{arrow} {name}" for arrow, name in shown)
    assert said.removesuffix(" < NewSessionTicket") == messages
    assert f"{'6e 6f 72 74 68' if tls == '1.2' else '6d 65 74 65 72 2d 37'}" in " ".join(done.stderr.split())
    assert "close_notify" in done.stderr
    assert DEVICE.key[:16] not in done.stderr.replace(" ", "")


def test_a_ring_has_the_key_for_the_hint(gateway: Gateway, key: Path, tmp_path: Path) -> None:
    ring = f"""
    [[keys]]
    hint = "south"
    identity = "m7"
    key = "{OTHER.key}"
    [[keys]]
    hint = "north"
    identity = "meter-7"
    key_file = "{key.name}"
    """
    path = private(tmp_path / "ring.toml", ring)
    target = f"127.0.0.1:{gateway.port()}"
    done = gatewayctl("connect", target, "--key-ring", path, "--tls", "1.2", input="x\n")
    assert (done.returncode, done.stdout) == (0, "ok 1\n")
    assert re.search(r": TLSv1\.2, [A-Z0-9-]+, hint north, identity meter-7\n", done.stderr)

    # TLS 1.3 has no hint: the default key is offered, which is the wrong one here.
    said = refused(gatewayctl("connect", target, "--key-ring", path, input="x\n", check=False))
    assert "the default key of the ring was offered, m7" in said
    path.write_text(ring + "default = true\n")
    assert gatewayctl("connect", target, "--key-ring", path, input="x\n").stdout == "ok 1\n"

    path.write_text(ring.replace("north", "east"))
    said = refused(gatewayctl("connect", target, "--key-ring", path, "--tls", "1.2", check=False))
    assert "the gateway's hint is 'north', and there are keys for 'south', 'east' only" in said


def test_wrong_hint_identity_and_key(gateway: Gateway, key: Path, tmp_path: Path) -> None:
    port = gateway.port()
    said = refused(connect(port, "--key-file", key, "--tls", "1.2", "--hint", "south"))
    assert (
        "the gateway's hint is 'north', and there are keys for 'south' only: is it the right gateway?" in said
    )
    for tls in ("1.2", "1.3"):
        wrong = key_file(tmp_path, Device("wrong", "ff" * 32))
        said = refused(connect(port, "--key-file", wrong, "--tls", tls))
        assert "refused the identity or the key: check both" in said
        assert said == refused(connect(port, "--key-file", key, "--tls", tls, identity="unknown"))


def test_a_gateway_that_is_away(key: Path) -> None:
    said = refused(connect(9, "--key-file", key))
    assert said == "error: cannot connect to 127.0.0.1:9: Connection refused: is the gateway running there?"
    done = gatewayctl("connect", "nowhere.invalid:8883", "--identity", "x", "--key-file", key, check=False)
    assert "nowhere.invalid cannot be found" in refused(done)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        said = refused(connect(port, "--key-file", key, "--timeout", "0.3"))
        assert said == f"error: 127.0.0.1:{port} did not answer within 0.3 s: is that a gateway?"


@pytest.mark.parametrize("tls", ["-tls1_2", "-tls1_3", "-no_tls1_1"])
def test_a_server_with_a_certificate_only(start: Start, tmp_path: Path, key: Path, tls: str) -> None:
    certificate, port = tmp_path / "certificate.pem", free_port()
    subprocess.run(
        [need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
         "-keyout", certificate, "-out", certificate.with_suffix(".crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    start(
        "s_server", "-accept", f"127.0.0.1:{port}", "-key", certificate, "-cert", certificate.with_suffix(".crt"), tls,
        program=need("openssl"),
    )  # fmt: skip
    wait_for(lambda: accepts(port), what="openssl s_server")
    said = refused(connect(port, "--key-file", key, lines="secret\n"))
    assert (
        "shows a certificate and proves no key" in said
        or "finds nothing in common: it serves certificates only" in said
    )


def test_a_server_that_is_no_tls_server(start: Start, key: Path, broker: int) -> None:
    said = refused(connect(broker, "--key-file", key))
    assert "closed the connection during the handshake" in said or "broke in the handshake" in said
    with socket.create_server(("127.0.0.1", 0)) as web:
        process = start("connect", f"127.0.0.1:{web.getsockname()[1]}", "--identity", "x", "--key-file", key)
        connection, _ = web.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        _, said = process.communicate(timeout=20)
        connection.close()
    assert process.returncode == 1
    assert "this is not a TLS-PSK server" in said


def test_a_key_file_that_others_may_read(key: Path) -> None:
    key.chmod(0o644)
    said = refused(connect(9, "--key-file", key))
    assert f"key file {key} can be read by others (mode 0644): run `chmod 600 {key}`" in said


def test_a_server_that_stops_reading(start: Start, key: Path) -> None:
    port = free_port()
    server = start(
        "s_server", "-accept", f"127.0.0.1:{port}", "-nocert", "-psk", DEVICE.key, "-psk_identity", "meter-7", "-quiet", "-tls1_2",
        program=need("openssl"),
    )  # fmt: skip
    wait_for(lambda: accepts(port), what="openssl s_server")
    process = start(
        "connect", f"127.0.0.1:{port}", "--identity", "meter-7", "--key-file", key, "--stall", "0.5"
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("connected to ")
    server.send_signal(signal.SIGSTOP)
    try:
        _, said = process.communicate("x" * 70 + "\n" * 20_000_000, timeout=30)
    finally:
        server.send_signal(signal.SIGCONT)
    assert process.returncode == 1
    assert said == (
        f"error: 127.0.0.1:{port} has read nothing for 0.5 s: is its backend well? What it did not read is lost\n"
    )


def test_a_gateway_that_ends_while_stdin_is_open(tmp_path: Path, start: Start, key: Path) -> None:
    gateway = new_gateway(tmp_path / "gateway")
    gateway.add_devices(NewDevice(identity=DEVICE.identity, key=Key(bytes.fromhex(DEVICE.key))))
    with running(gateway):
        process = start("connect", f"127.0.0.1:{gateway.port()}", "--identity", "meter-7", "--key-file", key)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("21.5\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ok 1\n"
    started = time.monotonic()
    assert process.wait(10) == 1
    assert time.monotonic() - started < 5
    assert process.stderr.read().endswith("error: the gateway closed the connection\n")


def test_wrong_usage() -> None:
    for arguments in (
        ["127.0.0.1:9"],
        ["nowhere", "--identity", "x"],
        ["127.0.0.1:9", "--key-ring", "r", "--identity", "x"],
    ):
        assert gatewayctl("connect", *arguments, check=False).returncode == 2
