"""trace-device on a real gateway: what it shows of one device, what it does not show of others, and its bounds."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ControlError
from gateway.server.control.channel import connect_unix
from gateway.server.control.messages import Message
from gateway.server.control.trace_messages import StartTrace, TraceOver, TraceStarted
from gateway.server.supervision.trace_relay import TRACE_S_MAX, TRACERS_MAX
from tests.support.capture import write_pcap
from tests.support.devices import TLS12, TLS13, Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.peers import WireTap, program

WRONG_KEY = "00" * 32
PAYLOAD = b"a-payload-that-only-its-owner-may-read"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = new_gateway(
        tmp_path_factory.mktemp("trace") / "gw", node="workers = 2", admin="allow_key_log = true"
    )
    with running(gateway):
        yield gateway
        assert gateway.complaints() == []


@pytest.fixture(scope="module")
def device(gateway: Gateway) -> Device:
    device = gateway.add_device("traced", "--group", "meters")
    gateway.add_device("late", "--not-before", "2099-01-01")
    gateway.add_device("away", "--allow-from", "192.0.2.0/24")
    gateway.wait_until_followed()
    return device


class Trace:
    """A `trace-device --json` that runs."""

    def __init__(self, gateway: Gateway, *args: object) -> None:
        started = len(gateway.events("trace_started"))
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "gateway",
                "trace-device",
                "--config",
                gateway.config,
                "--json",
                *map(str, args),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            wait_for(self._is_ready(gateway, started), what="the trace")
        except BaseException:
            self._process.kill()
            raise

    def _is_ready(self, gateway: Gateway, started: int) -> Any:
        def ready() -> bool:
            assert self._process.poll() is None, self._process.communicate()
            return len(gateway.events("trace_started")) > started

        return ready

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def events(self) -> list[dict[str, Any]]:
        """What it printed, when it has ended by itself with 0."""
        output, errors = self._process.communicate(timeout=20)
        assert self._process.returncode == 0, errors
        document = json.loads(output)
        assert isinstance(document, list)
        return document


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def messages(events: list[dict[str, Any]]) -> list[str]:
    return [f"{'>' if event['sent'] else '<'} {event['message']}" for event in of(events, "message")]


def refused(gateway: Gateway, device: Device, **settings: Any) -> None:
    with pytest.raises(Refused):
        TlsDevice.connect(gateway.port(), device, **settings)


TLS12_MESSAGES = [
    "< ClientHello", "> ServerHello", "> ServerKeyExchange", "> ServerHelloDone", "< ClientKeyExchange", "< Finished",
    "> ChangeCipherSpec", "> Finished",
]  # fmt: skip
TLS13_MESSAGES = ["< ClientHello", "> ServerHello", "> EncryptedExtensions", "> Finished", "< Finished"]


@pytest.mark.parametrize(("version", "expected"), [(TLS12, TLS12_MESSAGES), (TLS13, TLS13_MESSAGES)])
@pytest.mark.parametrize("target", ["traced", "127.0.0.1"])
def test_a_handshake_is_shown_message_by_message(
    gateway: Gateway, device: Device, version: Any, expected: list[str], target: str
) -> None:
    trace = Trace(gateway, target, "--count", 1)
    with TlsDevice.connect(gateway.port(), device, version=version) as session:
        events = trace.events()
        (listed,) = json.loads(gateway.ctl("list-sessions", "--device", "traced", "--json").stdout)
    shown = messages(events)
    assert [each for each in shown if each in expected] == expected
    assert len({event["connection"] for event in events}) == 1
    (outcome,) = of(events, "outcome")
    assert (outcome["outcome"], outcome["fix"]) == ("ok", "")
    for key in ("connection", "session", "tls_version", "cipher", "route"):
        assert outcome[key] == listed[key], key
    assert session.version == outcome["tls_version"]
    (hello,) = of(events, "hello")
    assert outcome["cipher"] in hello["suites"]
    assert outcome["cipher"] in hello["allowed_suites"]
    assert (hello["realm"], hello["server_name"], hello["hint"]) == ("default", None, None)
    assert hello["identities"] == (["traced"] if version is TLS13 else [])
    (identity,) = of(events, "identity")
    assert (identity["identity"], identity["device"]) == ("traced", "traced")
    assert device.key not in json.dumps(events)
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


@pytest.mark.parametrize("version", [TLS12, TLS13])
@pytest.mark.usefixtures("device")
def test_other_devices_are_not_shown(gateway: Gateway, version: Any) -> None:
    trace = Trace(gateway, "traced", "--count", 1)
    refused(gateway, Device("other", WRONG_KEY), version=version)
    refused(gateway, Device("traced", WRONG_KEY), version=version)
    events = trace.events()
    assert {event["identity"] for event in of(events, "identity")} == {"traced"}
    assert len({event["connection"] for event in events}) == 1


@pytest.mark.parametrize("version", [TLS12, TLS13])
@pytest.mark.parametrize(
    "case",
    [
        ("traced", "wrong_key", "rotate-key --realm default -- traced"),
        ("it isn't there", "unknown_identity", """add-device --realm default -- 'it isn'"'"'t there'`"""),
        ("late", "not_yet_valid", "it begins 2099-01-01T00:00:00Z"),
        ("away", "address_refused", "it came from 127.0.0.1 and may come from 192.0.2.0/24"),
    ],
)
@pytest.mark.usefixtures("device")
def test_each_refusal_says_what_to_do(gateway: Gateway, case: tuple[str, str, str], version: Any) -> None:
    identity, outcome, fix = case
    trace = Trace(gateway, identity, "--count", 1)
    refused(gateway, Device(identity, WRONG_KEY), version=version)
    events = trace.events()
    (ended,) = of(events, "outcome")
    assert ended["outcome"] == outcome
    assert fix in ended["fix"]
    assert (
        messages(events)[-1] == f"> Alert, fatal {'decrypt_error' if version is TLS13 else 'bad_record_mac'}"
    )


def test_no_shared_cipher_names_the_profile_that_would_do(gateway: Gateway, device: Device) -> None:
    trace = Trace(gateway, "127.0.0.1", "--count", 1)
    refused(gateway, device, version=TLS12, suites=("PSK-AES128-CCM8@SECLEVEL=0",))
    events = trace.events()
    (outcome,) = of(events, "outcome")
    assert outcome["outcome"] == "no_shared_cipher"
    assert outcome["fix"] == 'profile = "constrained" on listener tls allows PSK-AES128-CCM8'
    assert of(events, "hello")[0]["suites"] == ["PSK-AES128-CCM8"]


def test_what_is_not_tls_is_shown_by_address(gateway: Gateway) -> None:
    trace = Trace(gateway, "127.0.0.1", "--count", 2)
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00"):
        with socket.create_connection(("127.0.0.1", gateway.port())) as sock:
            sock.sendall(sent)
            sock.recv(100)
    events = trace.events()
    first, second = of(events, "outcome")
    assert (first["outcome"], first["reason"]) == ("protocol_error", "plain HTTP instead of TLS")
    assert second["outcome"] == "protocol_error"
    assert messages(events) == ["> Alert, fatal unexpected_message"]


def test_people_get_lines(gateway: Gateway, device: Device) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "trace-device", "--config", gateway.config, "traced", "--bytes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Tracing traced until ")
    refused(gateway, Device("traced", WRONG_KEY), version=TLS12)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "fix: " in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    process.stdout.close()
    process.stderr.close()
    text = "".join(lines)
    assert "<<< TLS 1.3, Handshake [length" in text or "<<< TLS 1.2, Handshake [length" in text
    assert ", ClientHello\n        01 00 " in text
    assert "outcome wrong_key after" in text
    assert "hint in TLS 1.2: none is sent" in text
    assert device.key not in text


def test_a_realm_that_is_another_is_not_shown(gateway: Gateway, device: Device) -> None:
    trace = Trace(gateway, "traced", "--realm", "elsewhere")
    refused(gateway, Device("traced", WRONG_KEY), version=TLS13)
    refused(gateway, Device("traced", WRONG_KEY), version=TLS12)
    with TlsDevice.connect(gateway.port(), device):
        pass
    trace.interrupt()
    assert trace.events() == []


@pytest.mark.usefixtures("device")
def test_a_device_is_followed_under_its_later_identities(gateway: Gateway) -> None:
    rotated = json.loads(gateway.ctl("rotate-key", "traced", "--json").stdout)
    gateway.wait_until_followed()
    trace = Trace(gateway, "traced", "--count", 2)
    for version in (TLS12, TLS13):
        TlsDevice.connect(
            gateway.port(), Device(rotated["identity"], rotated["key"]), version=version
        ).close()
    events = trace.events()
    assert [event["identity"] for event in of(events, "identity")] == [rotated["identity"]] * 2
    assert [event["outcome"] for event in of(events, "outcome")] == ["ok", "ok"]


def test_a_trace_goes_on_in_a_worker_that_was_started_again(gateway: Gateway, device: Device) -> None:
    trace = Trace(gateway, "traced", "--count", 4)
    before = gateway.worker_pids()
    with as_expected_to_end(gateway):
        os.kill(before[0], signal.SIGTERM)
        wait_for(lambda: len(set(gateway.worker_pids()) - set(before)) == 1, what="another worker")
        wait_for(lambda: json.loads(gateway.http("/readyz")[1])["status"] == "ready", 20, "both workers")
        for _ in range(4):
            TlsDevice.connect(gateway.port(), device).close()
        assert len(of(trace.events(), "outcome")) == 4


@contextlib.contextmanager
def as_expected_to_end(gateway: Gateway) -> Iterator[None]:
    """What the gateway complains of in here is the end of a worker that was wanted."""
    before = gateway.complaints()
    yield
    more = gateway.complaints()[len(before) :]
    assert all("child_ended" in line for line in more)
    text = gateway.log_path.read_text()
    for line in more:
        text = text.replace(line + "\n", "")
    gateway.log_path.write_text(text)


def test_time_and_number_of_traces_are_bounded(gateway: Gateway) -> None:
    started, ended = (len(gateway.events(event)) for event in ("trace_started", "trace_ended"))

    async def ask() -> str:
        over: asyncio.Queue[Message] = asyncio.Queue()
        async with connect_unix(gateway.directory / "data" / "control.sock", over.put) as channel:
            for _ in range(TRACERS_MAX):
                await channel.call(StartTrace("one", time.time() + 2), 5)
            with pytest.raises(ControlError) as refusal:
                await channel.call(StartTrace("one more", time.time() + 2), 5)
            for _ in range(TRACERS_MAX):
                assert isinstance(await asyncio.wait_for(over.get(), 10), TraceOver)
            later = await channel.call(StartTrace("later", time.time() + 1e9), 5)
            assert isinstance(later, TraceStarted)
            assert later.until <= time.time() + TRACE_S_MAX
        return str(refusal.value)

    assert "traces run already" in asyncio.run(ask())
    wait_for(lambda: len(gateway.events("trace_ended")) == ended + TRACERS_MAX + 1, what="their ends")
    assert len(gateway.events("trace_started")) == started + TRACERS_MAX + 1


def test_a_trace_without_a_gateway(tmp_path: Path) -> None:
    done = new_gateway(tmp_path / "gw").ctl("trace-device", "traced", check=False)
    assert done.returncode == 1
    assert "no gateway answers there" in done.stderr


# The key log


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_tshark_decrypts_with_the_key_log_and_not_without(
    gateway: Gateway, device: Device, tmp_path: Path, version: Any
) -> None:
    keys = tmp_path / "keys.log"
    trace = Trace(gateway, "traced", "--key-log", keys, "--for", "1m")
    refused(gateway, Device("other", WRONG_KEY), version=version)
    with WireTap(gateway.port()) as tap:
        with TlsDevice.connect(tap.port, device, version=version) as session:
            session.send(PAYLOAD + b"\n")
            assert session.receive_line() == "ok 1"
        capture = tmp_path / "session.pcap"
        write_pcap(capture, tap.pieces())
    wait_for(lambda: keys.read_text().count("\n") >= (5 if version is TLS13 else 1), what="the key log")
    trace.interrupt()
    trace.events()
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    clients = {line.split()[1] for line in keys.read_text().splitlines()}
    assert len(clients) == 1, "of the traced connection alone"
    assert PAYLOAD not in capture.read_bytes()
    assert decrypted(capture, keys) == [PAYLOAD + b"\n", b"ok 1\n"]
    (tmp_path / "empty").touch()
    assert decrypted(capture, tmp_path / "empty") == []
    audited = json.loads(gateway.ctl("audit-log", "--action", "write-key-log", "--json").stdout)
    assert audited[-1]["subject"] == "*/traced"
    assert audited[-1]["detail"]["until"] > audited[-1]["time"]
    assert gateway.events("trace_started")[-1]["key_log"] is True


def decrypted(capture: Path, keys: Path) -> list[bytes]:
    """The application data that tshark finds, in order."""
    done = subprocess.run(
        [
            program("tshark"), "-r", capture, "-o", f"tls.keylog_file:{keys}", "-d", "tcp.port==8883,tls", "-q",
            "-z", "follow,tls,raw,0",
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return [bytes.fromhex(line) for line in done.stdout.splitlines() if re.fullmatch(r"\t?[0-9a-f]+", line)]


def test_a_key_log_ends_with_its_time(gateway: Gateway, device: Device, tmp_path: Path) -> None:
    keys = tmp_path / "keys.log"
    trace = Trace(gateway, "traced", "--key-log", keys, "--for", "2s")
    TlsDevice.connect(gateway.port(), device, version=TLS12).close()
    events = trace.events()
    assert len(of(events, "outcome")) == 1
    size = keys.stat().st_size
    assert size
    TlsDevice.connect(gateway.port(), device, version=TLS12).close()
    assert keys.stat().st_size == size


def test_a_key_log_is_off_by_default(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw")
    keys = tmp_path / "keys.log"
    with running(gateway):
        done = gateway.ctl("trace-device", "traced", "--key-log", keys, check=False)
        assert (done.returncode, keys.exists()) == (1, False)
        assert "admin.allow_key_log = true" in done.stderr
        gateway.config.write_text(
            gateway.config.read_text().replace("[admin]", "[admin]\nallow_key_log = true")
        )
        done = gateway.ctl("trace-device", "traced", "--key-log", keys, check=False)
        assert (done.returncode, keys.exists()) == (1, False), "what runs was not told to allow it"
        assert "reload it" in done.stderr


def test_a_key_log_overwrites_nothing_and_is_bounded(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    done = gateway.ctl("trace-device", "traced", "--key-log", tmp_path / "there", check=False)
    assert done.returncode == 1
    assert (tmp_path / "there").read_text() == "mine"
    for too_long in ("2h", "0s"):
        done = gateway.ctl("trace-device", "x", "--key-log", tmp_path / "new", "--for", too_long, check=False)
        assert (done.returncode, (tmp_path / "new").exists()) == (2, False)
