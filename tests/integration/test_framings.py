"""Framings of messages with real gateways: what devices send, what comes back, and what is refused."""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

import pytest

from tests.support.device import RawDevice, add_devices
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

FRAMINGS = {"lines": 0, "length16": 2, "length32": 4}
ROUTES = "".join(
    f'[[routes]]\nname = "{framing}{suffix}"\nmatch = {{ group = "{framing}{suffix}" }}\nframing = "{framing}"\n'
    f'content_type = "{content_type}"\nbackend = "{backend}"\n{more}'
    for framing in FRAMINGS
    for suffix, content_type, backend, more in (
        ("", "text/plain", "events", ""),
        ("-json", "application/json", "events", ""),
        ("-ids", "text/plain", "events", 'message_id = "prefix"\n'),
        ("-reply", "text/plain", "service", "reply = true\n"),
    )
)
LIMITS = "message_bytes_max = 100\nidle_timeout_s = 3"


class Service(http.server.BaseHTTPRequestHandler):
    """Answers each message with what its text asks for."""

    bodies: ClassVar = {
        "plain": b"21 C",
        "break": b"two\nlines",
        "end": b"one line\r\n",
        "none": b"",
        "long": b"x" * 65_530,
    }

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = self.bodies[text]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing to say."""


@pytest.fixture(params=[False, True], ids=["uvloop", "asyncio"], scope="module")
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    gateway = new_gateway(
        tmp_path_factory.mktemp("framings") / "gateway",
        routes=ROUTES,
        limits=LIMITS,
        backends=f'[backends.service]\nkind = "http"\nurl = "http://127.0.0.1:{service.server_port}/"\nmode = "binary"\n',
        asyncio_only=request.param,
    )
    DEVICES.update(
        add_devices(
            gateway, {f + suffix: f + suffix for f in FRAMINGS for suffix in ("", "-json", "-ids", "-reply")}
        )
    )
    try:
        with running(gateway):
            yield gateway
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


DEVICES: dict[str, Device] = {}


class Speaker:
    """A device that speaks one framing."""

    def __init__(self, gateway: Gateway, framing: str, suffix: str = "") -> None:
        self.raw = RawDevice(gateway.port(), DEVICES[framing + suffix])
        self._prefix = FRAMINGS[framing]

    def frame(self, content: bytes) -> bytes:
        return len(content).to_bytes(self._prefix, "big") + content if self._prefix else content + b"\n"

    def say(self, *contents: bytes) -> None:
        self.raw.send(b"".join(map(self.frame, contents)))

    def hear(self) -> bytes:
        if not self._prefix:
            return self.raw.receive_line()
        return self.raw.receive_exactly(int.from_bytes(self.raw.receive_exactly(self._prefix), "big"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.raw.__exit__(None, None, None)


every_framing = pytest.mark.parametrize("framing", FRAMINGS)


@every_framing
def test_messages_and_answers(gateway: Gateway, framing: str) -> None:
    with Speaker(gateway, framing) as device:
        device.say(b"one", b"", b"three")
        assert [device.hear() for _ in range(3)] == [b"ok 1", b"ok 2", b"ok 3"]
        device.raw.finish()
        assert device.raw.receive() == b""
    wait_for(
        lambda: (
            [e["data"] for e in gateway.output_events() if e["device"] == framing] == ["one", "", "three"]
        ),
        what="the events",
    )


@every_framing
def test_a_frame_in_single_bytes(gateway: Gateway, framing: str) -> None:
    with Speaker(gateway, framing) as device:
        for byte in device.frame(b"slow"):
            device.raw.send(bytes([byte]))
        assert device.hear() == b"ok 1"


@every_framing
def test_a_frame_that_is_too_long_costs_itself_alone(gateway: Gateway, framing: str) -> None:
    before = gateway.metric("pskgw_messages_rejected_total", route=framing, reason="too_long")
    with Speaker(gateway, framing) as device:
        device.say(b"x" * 100, b"x" * 101, b"after")
        assert [device.hear() for _ in range(3)] == [b"ok 1", b"error 2 too_long", b"ok 3"]
    assert gateway.metric("pskgw_messages_rejected_total", route=framing, reason="too_long") == before + 1


def test_a_length_of_four_gigabytes(gateway: Gateway) -> None:
    """Refused at once; what follows counts as its content, is not held, and moves the idle deadline like any byte."""
    with Speaker(gateway, "length32") as device:
        device.raw.send(b"\xff\xff\xff\xff")
        assert device.hear() == b"error 1 too_long"
        (worker,) = gateway.worker_pids()
        before = resident_bytes(worker)
        for _ in range(32):
            device.raw.send(bytes(1 << 20))
        assert resident_bytes(worker) - before < 8 << 20
        device.raw.finish()
        assert device.raw.receive() == b""


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("framing", ["length16", "length32"])
def test_an_end_within_a_frame(gateway: Gateway, framing: str) -> None:
    with Speaker(gateway, framing) as device:
        device.raw.send(device.frame(b"whole") + device.frame(b"cut off")[:-3])
        device.raw.finish()
        assert [device.hear(), device.hear()] == [b"ok 1", b"error 2 invalid"]
        assert device.raw.receive() == b""


@every_framing
def test_what_is_not_the_content_type(gateway: Gateway, framing: str) -> None:
    with Speaker(gateway, framing) as device:
        device.say(b"\xff\xfe", b"fine")
        assert [device.hear(), device.hear()] == [b"error 1 invalid", b"ok 2"]
    with Speaker(gateway, framing, "-json") as device:
        device.say(b'{"t": 21', b'{"t": 21}')
        assert [device.hear(), device.hear()] == [b"error 1 invalid", b"ok 2"]


@every_framing
def test_ids_of_the_device(gateway: Gateway, framing: str) -> None:
    with Speaker(gateway, framing, "-ids") as device:
        device.say(b"m-1 twenty one", b"noid", b"m-2 x")
        assert [device.hear() for _ in range(3)] == [b"ok 1", b"error 2 invalid", b"ok 3"]
    with Speaker(gateway, framing, "-ids") as device:  # again, since it has not heard the answer
        device.say(b"m-2 x")
        assert device.hear() == b"ok 1"
    found = [e for e in gateway.output_events() if e["device"] == f"{framing}-ids"]
    assert [(e["id"], e["data"]) for e in found] == [("m-1", "twenty one"), ("m-2", "x"), ("m-2", "x")]
    assert len({e["source"] for e in found}) == 1


@every_framing
def test_replies(gateway: Gateway, framing: str) -> None:
    dropped = gateway.metric("pskgw_replies_dropped_total", route=f"{framing}-reply")
    with Speaker(gateway, framing, "-reply") as device:
        device.say(b"plain", b"break", b"end", b"none")
        answers = [device.hear() for _ in range(4)]
        if framing == "lines":
            assert answers == [b"reply 1 21 C", b"ok 2", b"reply 3 one line", b"ok 4"]
        else:
            assert answers == [b"reply 1 21 C", b"reply 2 two\nlines", b"reply 3 one line\r\n", b"ok 4"]
    assert gateway.metric("pskgw_replies_dropped_total", route=f"{framing}-reply") - dropped == (
        framing == "lines"
    )


def test_a_reply_that_the_prefix_cannot_count(gateway: Gateway) -> None:
    with Speaker(gateway, "length16", "-reply") as device:
        device.say(b"long")
        assert device.hear() == b"ok 1"  # 65,530 bytes and `reply 1 ` are more than 65,535


def test_a_session_that_does_not_read_ends_at_its_idle_deadline(gateway: Gateway) -> None:
    """It never reads its answers, so it is not read either, and a paused transport sees no reset: the deadline holds."""
    device = RawDevice(gateway.port(), DEVICES["lines"], receive_buffer=4096)
    sock = device._socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    sock.settimeout(0.5)
    stuck = b"\n" * 16_000
    started = time.monotonic()
    with contextlib.suppress(TimeoutError):  # the window closes, since nobody reads
        while time.monotonic() - started < 20:
            device.send(stuck)
    assert time.monotonic() - started < 20
    assert any(each["device"] == "lines" for each in gateway.sessions())
    device.abort()
    wait_for(
        lambda: not any(each["device"] == "lines" for each in gateway.sessions()),
        timeout_s=10,
        what="the end",
    )


def test_a_session_whose_backend_never_answers_ends_at_its_idle_deadline(tmp_path: Path) -> None:
    deaf = socket.create_server(("127.0.0.1", 0))
    gateway = new_gateway(
        tmp_path / "gateway",
        routes='[[routes]]\nname = "deaf"\nframing = "lines"\nbackend = "deaf"\n',
        limits="idle_timeout_s = 4",
        backends=f'[backends.deaf]\nkind = "http"\nurl = "http://127.0.0.1:{deaf.getsockname()[1]}/"\n',
    )
    device = gateway.add_device("patient")
    with deaf, running(gateway):
        raw = RawDevice(gateway.port(), device)
        raw.send(b"x\n" * 2000)  # far over the window of one session: it is paused
        wait_for(gateway.sessions, what="the session")
        raw.abort()
        started = time.monotonic()
        wait_for(lambda: not gateway.sessions(), timeout_s=10, what="the end")
        assert time.monotonic() - started < 8


def test_effective_configuration_masks_the_password(tmp_path: Path) -> None:
    gateway = new_gateway(
        tmp_path / "gateway",
        routes='[[routes]]\nname = "m"\nframing = "mqtt"\nmqtt_password = "hunter2"\nbackend = "b"\n',
        backends='[backends.b]\nkind = "tcp"\nurl = "tcp://127.0.0.1:1883"\n',
    )
    shown = gateway.ctl("check-config", "--json").stdout
    assert "hunter2" not in shown
    assert json.loads(shown)["routes"][0]["mqtt_password"] == "***"


@pytest.mark.parametrize(
    ("route", "error"),
    [
        ('framing = "lines"\nmqtt_password = "x"\nbackend = "events"', "mqtt_password: it has no effect"),
        (
            'framing = "stream"\nmessage_id = "prefix"\nbackend = "b"',
            "message_id: framing = stream has no messages",
        ),
        ('framing = "mqtt"\nbackend = "events"', "framing = mqtt does not go with a backend of kind file"),
        ('framing = "mqtt"\nack = true\nbackend = "b"', "ack = true"),
        ('framing = "length24"\nbackend = "events"', "must be"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, route: str, error: str) -> None:
    gateway = new_gateway(
        tmp_path / "gateway",
        routes=f'[[routes]]\nname = "m"\n{route}\n',
        backends='[backends.b]\nkind = "tcp"\nurl = "tcp://127.0.0.1:1883"\n',
    )
    done = gateway.ctl("check-config", check=False)
    assert (done.returncode, error in done.stderr) == (1, True), done.stderr
