"""`gatewayctl connect`: our own device in the terminal, as a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.interop.conftest import Fleet
from tests.support.gateway import Device, gatewayctl
from tests.support.peers import Peer
from tests.support.services import Behaviour, Peer as Connection, Service, resets, speaks_first, unused_port


@pytest.fixture
def key_file(fleet: Fleet, tmp_path: Path) -> Path:
    path = tmp_path / "meter.key"
    path.write_text(fleet["meter"].key + "\n")
    path.chmod(0o600)
    return path


def connect(
    port: int, *options: object, lines: str = "", identity: str = "meter", status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run it to its end. A failure is one line that begins with `error: `."""
    done = gatewayctl(
        "connect", f"127.0.0.1:{port}", "--identity", identity, *options, input=lines, check=False
    )
    assert done.returncode == status, done.stderr
    if status == 1:
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert "Traceback" not in done.stderr
    return done


def typed(port: int, identity: str, key_file: Path) -> Peer:
    """With a stdin that stays open."""
    command = ("connect", f"127.0.0.1:{port}", "--identity", identity, "--key-file", key_file)
    return Peer(sys.executable, "-m", "gateway", *command)


def test_lines_and_answers(fleet: Fleet, key_file: Path) -> None:
    done = connect(fleet.port, "--key-file", key_file, lines="connect 1\nconnect 2\nconnect 3")
    assert done.stdout == "ok 1\nok 2\nok 3\n"
    assert done.stderr == f"connected to 127.0.0.1:{fleet.port}: TLSv1.3, TLS_AES_128_GCM_SHA256\n"
    sent = [event["data"] for event in fleet.gateway.output_events() if event["data"].startswith("connect ")]
    assert sent == ["connect 1", "connect 2", "connect 3"]


def test_end_of_input_waits_for_the_answers_only(fleet: Fleet, key_file: Path) -> None:
    """It ends when the gateway has closed, not after the five seconds that it would wait."""
    since = time.monotonic()
    many = "".join(f"many {number}\n" for number in range(1000))
    done = connect(fleet.port, "--key-file", key_file, lines=many)
    assert done.stdout == "".join(f"ok {number}\n" for number in range(1, 1001))
    assert connect(fleet.port, "--key-file", key_file).stdout == ""
    assert time.monotonic() - since < 5


def test_interactive(fleet: Fleet, key_file: Path) -> None:
    """Each line goes out when it is typed, and its answer is printed when it comes."""
    with typed(fleet.port, "meter", key_file) as peer:
        peer.expect(r"^connected to ")
        for number in (1, 2):
            fleet.arrives(peer)
            assert f"ok {number}\n" in peer.output
        assert peer.finish() == 0


def test_ways_to_give_the_key(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    key = fleet["meter"].key
    assert connect(fleet.port, "--key-file", "-", lines=f"{key}\nby stdin\n").stdout == "ok 1\n"
    monkeypatch.setenv("PSKGW_KEY", key.upper())
    assert connect(fleet.port, lines="by environment\n").stdout == "ok 1\n"


def test_nobody_to_ask_for_the_key(fleet: Fleet) -> None:
    """Without a terminal, what stands in stdin is not taken for the key."""
    command = [sys.executable, "-m", "gateway", "connect", f"127.0.0.1:{fleet.port}", "--identity", "meter"]
    done = subprocess.run(
        command,
        input="a line\n",
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no terminal to ask for the key")


def test_answers_that_say_no(fleet: Fleet, key_file: Path) -> None:
    done = connect(fleet.port, "--key-file", key_file, lines="x" * 65_537 + "\nfine\n" + "y" * 65_536 + "\n")
    assert done.stdout == "error 1 too_long\nok 2\nok 3\n"


@pytest.mark.parametrize("identity", ["meter", "nobody", "disabled", "expired", "early", "elsewhere"])
def test_a_refused_device_is_told_to_check(fleet: Fleet, tmp_path: Path, identity: str) -> None:
    device = Device("meter", "00" * 32) if identity in ("meter", "nobody") else fleet[identity]
    (tmp_path / "key").write_text(device.key)
    (tmp_path / "key").chmod(0o600)
    done = connect(fleet.port, "--key-file", tmp_path / "key", identity=identity, lines="lost\n", status=1)
    assert done.stdout == ""
    assert "check both" in done.stderr
    assert device.key not in done.stderr


def test_no_route(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(fleet["nowhere"].key)
    (tmp_path / "key").chmod(0o600)
    with typed(fleet.port, "nowhere", tmp_path / "key") as peer:
        peer.expect(r"^error: the gateway closed the connection\n")
        assert peer.ended() == 1


def test_no_gateway(key_file: Path) -> None:
    done = connect(unused_port(), "--key-file", key_file, status=1)
    assert "is the gateway running there?" in done.stderr


async def hangs_up(connection: Connection) -> None:
    """Close it at the first bytes, in an orderly way: with bytes unread it would be a reset."""
    await connection.receive()


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (hangs_up, "closed the connection during the handshake"),
        (resets, "the connection broke"),
        (speaks_first(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "this is not a TLS-PSK server"),
    ],
)
def test_no_tls_there(key_file: Path, behaviour: Behaviour, said: str) -> None:
    with Service(behaviour) as service:
        done = connect(service.port, "--key-file", key_file, status=1)
    assert said in done.stderr


@pytest.mark.parametrize("text", ["", "not hex", "00" * 15, "00" * 65])
def test_a_key_that_is_none(fleet: Fleet, tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    (tmp_path / "key").chmod(0o600)
    connect(fleet.port, "--key-file", tmp_path / "key", status=1)


def test_a_key_file_that_is_not_there(fleet: Fleet, tmp_path: Path) -> None:
    done = connect(fleet.port, "--key-file", tmp_path / "missing", status=1)
    assert str(tmp_path / "missing") in done.stderr


def test_an_identity_that_is_none(fleet: Fleet, key_file: Path) -> None:
    connect(fleet.port, "--key-file", key_file, identity="x" * 129, status=1)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:99999", "::1:8883"])
def test_wrong_usage(key_file: Path, address: str) -> None:
    done = gatewayctl("connect", address, "--identity", "meter", "--key-file", key_file, check=False)
    assert done.returncode == 2


def test_the_gateway_ends_the_session(either_loop: Fleet, tmp_path: Path) -> None:
    device = either_loop.take("lines")
    (tmp_path / "key").write_text(device.key)
    (tmp_path / "key").chmod(0o600)
    with typed(either_loop.port, device.identity, tmp_path / "key") as peer:
        peer.expect(r"^connected to ")
        either_loop.gateway.ctl("kick-device", device.identity)
        assert peer.ended() == 1
        assert peer.output.endswith("error: the gateway closed the connection\n")
