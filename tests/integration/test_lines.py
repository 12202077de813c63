"""Lines routes to the file backend: every frame answered once and in order, every event whole."""

import base64
import contextlib
import dataclasses
import datetime as dt
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from gateway.registry.store import NewDevice
from tests.support.capabilities import Unavailable, missing, small_disk
from tests.support.devices import TLS12, TLS13, End, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.memory import MemoryWatch

MIB = 1 << 20
MESSAGE_BYTES_MAX = 1024
GROWTH_BYTES_MAX = 4 * MIB
"""The bound of one session: a read of 256 KiB, in frames and in events, and 256 messages that wait."""
DISK_BYTES = 256 * 1024
STRANGE_NAME = "Zähler/7 (süd)%2"

ROUTES = {
    # group and route: content type, acknowledged, file
    "text": ("text/plain", True, "text.jsonl"),
    "json": ("application/json", True, "json.jsonl"),
    "bytes": ("application/octet-stream", True, "bytes.jsonl"),
    "quiet": ("application/json", False, "quiet.jsonl"),
    "disk": ("text/plain", True, "disk/events.jsonl"),
    "stdout": ("text/plain", True, "-"),
}


@dataclasses.dataclass
class Stage:
    """A gateway of two workers with one route and one device for each kind of lines."""

    gateway: Gateway
    devices: dict[str, Device]
    port: int
    no_disk: str
    """Why there is no small disk, empty when there is one."""

    def connect(self, name: str, **settings: object) -> TlsDevice:
        return TlsDevice.connect(self.port, self.devices[name], **settings)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What arrived at the backend of a route: whole lines only."""
        path = self.gateway.directory / ROUTES[name][2]
        content = path.read_bytes()
        assert not content or content.endswith(b"\n")
        return [json.loads(line) for line in content.splitlines()]

    def new_events(self, name: str) -> "Callable[[], list[dict[str, Any]]]":
        """What arrives from now on."""
        path = self.gateway.directory / ROUTES[name][2]
        known = len(path.read_bytes().splitlines()) if path.exists() else 0
        return lambda: self.events(name)[known:]


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    gateway = new_gateway(
        tmp_path_factory.mktemp("lines") / "gateway",
        node="workers = 2",
        limits=f"message_bytes_max = {MESSAGE_BYTES_MAX}",
        routes="".join(
            f'[[routes]]\nname = "{name}"\nmatch = {{ group = "{name}" }}\nframing = "lines"\n'
            f'content_type = "{content_type}"\nack = {str(ack).lower()}\nbackend = "{name}"\n'
            for name, (content_type, ack, _) in ROUTES.items()
        ),
        backends="".join(
            f'[backends.{name}]\nkind = "file"\npath = "{path}"\n' for name, (_, _, path) in ROUTES.items()
        ),
        asyncio_only=request.param == "asyncio",
    )
    added = gateway.add_devices(
        *(NewDevice(identity=name, group=name) for name in ROUTES),
        NewDevice(identity=STRANGE_NAME, group="text"),
    )
    devices = {device.identity: device for device in added}
    folder = gateway.directory / "disk"
    with contextlib.ExitStack() as stack:
        no_disk = ""
        try:
            stack.enter_context(small_disk(folder, DISK_BYTES))
        except Unavailable as exc:
            no_disk = str(exc)
            folder.mkdir(exist_ok=True)
        stack.enter_context(running(gateway))
        wait_for(lambda: len(gateway.events("accepting")) == 2, what="both workers accept")
        yield Stage(gateway, devices, gateway.port(), no_disk)
        assert gateway.stop() == 0
        assert gateway.complaints() == []


@pytest.fixture(params=[TLS12, TLS13], ids=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> object:
    return request.param


# Answers


def test_pipelined_lines_are_acknowledged_in_order_and_arrive_in_order(stage: Stage, version: object) -> None:
    count = 2_000
    arrived = stage.new_events("text")
    with stage.connect("text", version=version) as device:
        device.send("".join(f"line {n}\n" for n in range(1, count + 1)).encode())
        answers = device.receive_lines(count)
    assert answers == [f"ok {n}" for n in range(1, count + 1)]
    events = arrived()
    assert [event["data"] for event in events] == [f"line {n}" for n in range(1, count + 1)]
    assert [int(event["sequence"]) for event in events] == list(range(1, count + 1))


def test_an_acknowledged_event_is_in_the_file_already(stage: Stage) -> None:
    arrived = stage.new_events("text")
    with stage.connect("text") as device:
        for number in range(1, 51):
            device.send(b"now %d\n" % number)
            assert device.receive_line() == f"ok {number}"
            assert arrived()[-1]["data"] == f"now {number}"


def test_refused_frames_are_answered_at_their_place(stage: Stage) -> None:
    source = random.Random(7)
    kinds = {
        b'{"t": 21.5}': None,
        b"[1, 2, 3]": None,
        b"{": "invalid",
        b"": "invalid",
        b"\xff\xfe": "invalid",
        b"x" * (MESSAGE_BYTES_MAX + 1): "too_long",
        b'"' + b"y" * (MESSAGE_BYTES_MAX - 2) + b'"': None,
    }
    lines = source.choices(list(kinds), k=700)
    arrived = stage.new_events("json")
    rejected = {reason: _rejected(stage, "json", reason) for reason in ("invalid", "too_long")}
    received = stage.gateway.metric("pskgw_messages_received_total", route="json")
    delivered = stage.gateway.metric("pskgw_messages_delivered_total", route="json")
    with stage.connect("json") as device:
        device.send(b"\n".join(lines) + b"\n")
        device.finish()
        answers = device.receive_to_end().decode().splitlines()
        assert device.end is End.NOTIFIED
    expected = [kinds[line] for line in lines]
    assert answers == [
        f"ok {n}" if reason is None else f"error {n} {reason}" for n, reason in enumerate(expected, 1)
    ]
    good = [n for n, reason in enumerate(expected, 1) if reason is None]
    assert [int(event["sequence"]) for event in arrived()] == good
    for reason, before in rejected.items():
        assert _rejected(stage, "json", reason) - before == expected.count(reason)
    assert stage.gateway.metric("pskgw_messages_received_total", route="json") - received == len(lines)
    assert stage.gateway.metric("pskgw_messages_delivered_total", route="json") - delivered == len(good)


def _rejected(stage: Stage, route: str, reason: str) -> float:
    return stage.gateway.metric("pskgw_messages_rejected_total", route=route, reason=reason)


def test_text_that_is_not_utf8_is_invalid(stage: Stage) -> None:
    with stage.connect("text") as device:
        device.send("wärme\n".encode() + b"\xe4\n" + b"after\n")
        assert device.receive_lines(3) == ["ok 1", "error 2 invalid", "ok 3"]


def test_without_ack_only_errors_are_answered(stage: Stage) -> None:
    arrived = stage.new_events("quiet")
    with stage.connect("quiet") as device:
        device.send(b"1\nnot json\n3\n" + b"z" * 5_000 + b"\n5\n")
        device.finish()
        assert device.receive_to_end() == b"error 2 invalid\nerror 4 too_long\n"
        assert device.end is End.NOTIFIED
    assert [event["data"] for event in arrived()] == [1, 3, 5]


def test_line_ends_and_empty_lines(stage: Stage) -> None:
    arrived = stage.new_events("text")
    with stage.connect("text") as device:
        device.send(b"crlf\r\n\nlf\n\r\n")
        assert device.receive_lines(4) == ["ok 1", "ok 2", "ok 3", "ok 4"]
    assert [event["data"] for event in arrived()] == ["crlf", "", "lf", ""]


def test_the_rest_before_close_notify_is_a_frame(stage: Stage, version: object) -> None:
    arrived = stage.new_events("text")
    with stage.connect("text", version=version) as device:
        device.send(b"whole\nunterminated")
        device.finish()
        assert device.receive_to_end() == b"ok 1\nok 2\n"
        assert device.end is End.NOTIFIED
    assert [event["data"] for event in arrived()] == ["whole", "unterminated"]


def test_the_rest_before_a_bare_fin_is_not_a_frame(stage: Stage) -> None:
    """Without close_notify nobody knows whether the rest is whole (RFC 8446 section 6.1)."""
    arrived = stage.new_events("text")
    with stage.connect("text") as device:
        device.send(b"whole\nunterminated")
        device.sock.shutdown(1)
        assert device.receive_to_end() == b"ok 1\n"
        assert device.end is End.NOTIFIED
    assert [event["data"] for event in arrived()] == ["whole"]


def test_what_a_device_sent_before_it_vanished_arrives(stage: Stage) -> None:
    arrived = stage.new_events("text")
    device = stage.connect("text")
    device.send(b"last words\n")
    assert device.receive_line() == "ok 1"
    device.send(b"and one more\n")
    device.close()
    wait_for(lambda: len(arrived()) == 2, what="the message of a device that is gone")


def test_a_kicked_device_gets_close_notify_and_may_come_again(stage: Stage) -> None:
    with stage.connect("text") as device:
        device.send(b"before\n")
        assert device.receive_line() == "ok 1"
        stage.gateway.ctl("kick-device", "text")
        assert device.receive_to_end() == b""
        assert device.end is End.NOTIFIED
    with stage.connect("text") as device:
        device.send(b"after\n")
        assert device.receive_line() == "ok 1"


# Events


def test_every_event_is_a_valid_cloudevent(stage: Stage) -> None:
    payloads: dict[str, tuple[bytes, object]] = {
        "text": ("Grüße \x7f\t\u2028".encode(), "Grüße \x7f\t\u2028"),
        "json": (b' {"a": [1.0, "\\u0000", null]} ', {"a": [1.0, "\0", None]}),
        "bytes": (bytes(set(range(256)) - {10, 13}), None),
    }
    began = dt.datetime.now(dt.UTC)
    for name, (payload, data) in payloads.items():
        arrived = stage.new_events(name)
        with stage.connect(name) as device:
            device.send(payload + b"\n" + payload + b"\n")
            assert device.receive_lines(2) == ["ok 1", "ok 2"]
            first, second = arrived()
        _check_event(first, name, ROUTES[name][0], 1, began)
        _check_event(second, name, ROUTES[name][0], 2, began)
        assert first["id"].rpartition("-")[0] == second["id"].rpartition("-")[0]
        if data is None:
            assert base64.b64decode(first["data_base64"], validate=True) == payload
            assert "data" not in first
        else:
            assert first["data"] == data
            assert "data_base64" not in first


def test_a_strange_name_is_encoded_in_the_source(stage: Stage) -> None:
    arrived = stage.new_events("text")
    began = dt.datetime.now(dt.UTC)
    with stage.connect(STRANGE_NAME) as device:
        device.send(b"x\n")
        assert device.receive_line() == "ok 1"
    (event,) = arrived()
    _check_event(event, STRANGE_NAME, "text/plain", 1, began)


def _check_event(
    event: dict[str, Any], device: str, content_type: str, sequence: int, began: dt.datetime
) -> None:
    assert set(event) - {"data", "data_base64"} == {
        "specversion", "id", "source", "type", "time", "datacontenttype", "realm", "device", "sequence",
    }  # fmt: skip
    assert event["specversion"] == "1.0"
    session, _, number = event["id"].rpartition("-")
    assert session[14] == "7"  # a UUID of version 7
    assert number == event["sequence"] == f"{sequence:020d}"
    assert event["type"] == "device.payload"
    assert event["datacontenttype"] == content_type
    assert (event["realm"], event["device"]) == ("default", device)
    assert event["source"].isascii()
    _, realms, realm, devices, name = event["source"].split("/")
    assert (realms, unquote(realm), devices, unquote(name)) == ("realms", "default", "devices", device)
    assert began <= dt.datetime.fromisoformat(event["time"]) <= dt.datetime.now(dt.UTC)


# Bounds


def test_a_frame_without_an_end_is_refused_once_and_fills_no_memory(
    stage: Stage, measured: Callable[[str], None]
) -> None:
    size = 64 * MIB
    refused = _rejected(stage, "text", "too_long")
    with MemoryWatch(stage.gateway.worker_pids()) as watch, stage.connect("text") as device:
        for _ in range(size // MIB):
            device.send(b"x" * MIB)
        device.send(b"\nnext\n")
        assert device.receive_lines(2) == ["error 1 too_long", "ok 2"]
    assert _rejected(stage, "text", "too_long") - refused == 1
    measured(f"a line of 64 MiB: worker grew by {watch.growth_bytes / MIB:.1f} MiB, bound 4")
    assert watch.growth_bytes < GROWTH_BYTES_MAX


def test_a_flood_of_tiny_frames_fills_no_memory(stage: Stage, measured: Callable[[str], None]) -> None:
    """As many frames as one read can hold: each is much larger as a message than on the wire."""
    count = 100_000
    with MemoryWatch(stage.gateway.worker_pids()) as watch, stage.connect("text") as device:
        device.send(b"\n" * count)
        device.finish()
        answers = device.receive_to_end().decode().splitlines()
    assert answers == [f"ok {n}" for n in range(1, count + 1)]
    measured(f"{count} empty lines at once: worker grew by {watch.growth_bytes / MIB:.1f} MiB, bound 4")
    assert watch.growth_bytes < GROWTH_BYTES_MAX


def test_a_device_that_never_reads_its_answers_is_held_back(
    stage: Stage, measured: Callable[[str], None]
) -> None:
    with (
        MemoryWatch(stage.gateway.worker_pids()) as watch,
        stage.connect("json", receive_buffer_bytes=4096) as device,
    ):
        device.sock.settimeout(1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 * MIB:
                device.send(b"{\n" * 8_000)
                sent += 16_000
        assert sent < 64 * MIB, "nothing held the device back"
        with stage.connect("json") as other:
            other.send(b"1\n")
            assert other.receive_line() == "ok 1"
    measured(f"{sent / MIB:.1f} MiB unread: worker grew by {watch.growth_bytes / MIB:.1f} MiB, bound 4")
    assert watch.growth_bytes < GROWTH_BYTES_MAX


# Stdout, and a full disk


def test_stdout_of_two_workers_has_whole_lines_only(stage: Stage) -> None:
    names = print_lines(stage.gateway, "file")
    content = stage.gateway.stdout_path.read_bytes()
    check_printed(content, names)


def test_a_pipe_as_stdout_gets_whole_lines_only(tmp_path: Path) -> None:
    """A pipe takes what it has room for, so that one write is not one piece."""
    gateway = new_gateway(
        tmp_path / "gateway",
        node="workers = 2",
        routes='[[routes]]\nname = "stdout"\nframing = "lines"\ncontent_type = "text/plain"\nbackend = "stdout"\n',
        backends='[backends.stdout]\nkind = "file"\npath = "-"\n',
    )
    os.mkfifo(gateway.stdout_path)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(gateway.stdout_path.read_bytes)
        with running(gateway):
            wait_for(lambda: len(gateway.events("accepting")) == 2, what="both workers accept")
            names = print_lines(gateway, "pipe")
            assert gateway.stop() == 0
            assert gateway.complaints() == []
        check_printed(reading.result(10), names)


PRINTERS, PRINTED = 24, 150


def print_lines(gateway: Gateway, prefix: str) -> set[str]:
    """Let many devices, some on each worker, send lines for stdout; their names."""
    devices = gateway.add_devices(
        *(NewDevice(identity=f"{prefix}-{number}", group="stdout") for number in range(PRINTERS))
    )
    gateway.wait_until_followed()
    port = gateway.port()

    def talk(device: Device) -> None:
        with TlsDevice.connect(port, device) as connection:
            for number in range(1, PRINTED + 1):
                connection.send(f"{number} {'x' * (number * 7 % 900)}\n".encode())
                assert number % 10 or len(connection.receive_lines(10)) == 10

    with ThreadPoolExecutor(PRINTERS) as threads:
        for done in [threads.submit(talk, device) for device in devices]:
            done.result()
    names = {device.identity for device in devices}
    started = [entry for entry in gateway.events("session_started") if entry["device"] in names]
    assert {entry["process"] for entry in started} == {"worker-0", "worker-1"}
    return names


def check_printed(content: bytes, names: set[str]) -> None:
    """Everything is there once, in order for each device, and no line is torn."""
    assert content.endswith(b"\n")
    printed: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for event in map(json.loads, content.splitlines()):
        printed[event["device"]].append(event)
    for events in printed.values():
        assert [int(event["sequence"]) for event in events] == list(range(1, PRINTED + 1))
        assert all(event["data"].split()[0] == str(n) for n, event in enumerate(events, 1))


def test_a_full_disk_is_answered_and_heals(stage: Stage) -> None:
    if stage.no_disk:
        missing(stage.no_disk)
    filler = stage.gateway.directory / "disk" / "filler"
    payload = b"y" * 1000
    refused = _rejected(stage, "disk", "unavailable")
    acknowledged: list[int] = []
    with stage.connect("disk") as device:
        number = 0

        def answer() -> str:
            nonlocal number
            number += 1
            device.send(payload + b"\n")
            line = device.receive_line()
            if line == f"ok {number}":
                acknowledged.append(number)
            else:
                assert line == f"error {number} unavailable"
            return line

        assert answer() == "ok 1"
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(DISK_BYTES // 2))
        wait_for(lambda: "unavailable" in answer(), what="the disk is full")
        for _ in range(20):
            assert "unavailable" in answer()
        filler.unlink()
        assert answer() == f"ok {number}"
        device.send((payload + b"\n") * 20)
        assert device.receive_lines(20) == [f"ok {n}" for n in range(number + 1, number + 21)]
        acknowledged.extend(range(number + 1, number + 21))
    assert [int(event["sequence"]) for event in stage.events("disk")] == acknowledged
    assert _rejected(stage, "disk", "unavailable") - refused == 21
    log = [entry for entry in stage.gateway.events() if entry.get("backend") == "disk"]
    assert [entry["event"] for entry in log] == ["backend_away", "backend_back"]
    assert "No space left" in log[0]["reason"]
