"""Devices, a whole gateway, and real backends: what a device sends, what it is answered, what arrives."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backends import LOGIN, SUBJECTS, HttpSubject, MqttSubject, NatsSubject, Subject
from tests.support.device import RawDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.servers import PASSWORD, Certificates


def route(name: str, backend: str, **more: object) -> str:
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return (
        f'[[routes]]\nname = "{name}"\nmatch = {{ group = "{name}" }}\nframing = "lines"\n'
        f'content_type = "text/plain"\nbackend = "{backend}"\n{lines}'
    )


def backend(name: str, settings: dict[str, object]) -> str:
    return f"[backends.{name}]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in settings.items()
    )


@pytest.fixture
def subjects(tmp_path: Path, certificates: Certificates) -> Iterator[dict[str, Subject]]:
    made: dict[str, Subject] = {
        kind: SUBJECTS[kind](tmp_path / kind, certificates)
        for kind in ("http-binary", "mqtt-5", "nats", "redis")
    }
    try:
        for subject in made.values():
            subject.server.start()
            subject.begin()
        yield made
    finally:
        for subject in made.values():
            subject.stop()


def answers(gateway: Gateway, device: Device, lines: list[str]) -> list[str]:
    """What a device is answered. It was added before the start, so the gateway knows it."""
    with RawDevice(gateway.port(), device) as raw:
        raw.send("".join(f"{line}\n" for line in lines).encode())
        return [raw.receive_line().decode() for _ in lines]


def test_messages_of_devices(tmp_path: Path, subjects: dict[str, Subject]) -> None:
    echo = subjects["http-binary"]
    assert isinstance(echo, HttpSubject)
    gateway = new_gateway(
        tmp_path / "gw",
        routes=route("web", "web", ack=True)
        + route("echo", "echo", reply=True)
        + route("mqtt", "mqtt", ack=True)
        + route("nats", "nats", delivery="spooled")
        + route("redis", "redis", delivery="spooled"),
        backends=backend("web", echo.settings())
        + backend(
            "echo", {"kind": "http", "url": f"http://127.0.0.1:{echo.server.port}/echo", "mode": "binary"}
        )
        + "".join(
            backend(kind[:4] if kind == "mqtt-5" else kind, subjects[kind].settings())
            for kind in ("mqtt-5", "nats", "redis")
        ),
    )
    groups = ("web", "echo", "mqtt", "nats", "redis")
    devices = {group: gateway.add_device(f"d-{group}", "--group", group) for group in groups}
    smugglers = [
        gateway.add_device("up/+/#", "--group", "mqtt"),
        gateway.add_device("a.b.>", "--group", "nats"),
    ]
    with running(gateway):
        for group, kind in (("web", "http-binary"), ("mqtt", "mqtt-5"), ("nats", "nats"), ("redis", "redis")):
            lines = [f"reading {number}" for number in range(1, 51)]
            assert answers(gateway, devices[group], lines) == [f"ok {n}" for n in range(1, 51)], group
            arrived = subjects[kind].arrived(50)
            assert [each.payload.decode() for each in arrived] == lines
            assert {each.attributes["device"] for each in arrived} == {f"d-{group}"}
        assert answers(gateway, devices["echo"], ["ping", "pong"]) == ["reply 1 ping", "reply 2 pong"]
        # Separators that an identity brings: refused, counted, nothing arrives; direct and spooled.
        assert answers(gateway, smugglers[0], ["x"]) == ["error 1 refused"]
        assert answers(gateway, smugglers[1], ["x"]) == ["ok 1"]
        wait_for(lambda: dead_letters(gateway), what="the dead letter")
        assert gateway.metric("pskgw_messages_rejected_total", route="mqtt", reason="refused") == 1
        assert len(subjects["mqtt-5"].arrived(50)) == 50
        assert len(subjects["nats"].arrived(50)) == 50
    assert PASSWORD not in gateway.log_path.read_text()


def dead_letters(gateway: Gateway) -> list[object]:
    listed = json.loads(gateway.ctl("list-dead-letters", "--json").stdout)
    assert isinstance(listed, list)
    return listed


@pytest.mark.parametrize("kind", ["mqtt-5", "nats"])
def test_a_wrong_login_is_logged_once_without_the_secret(
    tmp_path: Path, certificates: Certificates, kind: str
) -> None:
    subject = SUBJECTS[kind](tmp_path / kind, certificates)
    assert isinstance(subject, MqttSubject | NatsSubject)
    subject.place = "up"
    with subject.server:
        gateway = new_gateway(
            tmp_path / "gw", routes=route("r", "b", ack=True), backends=backend("b", subject.wrong_login())
        )
        device = gateway.add_device("d", "--group", "r")
        with running(gateway):
            event = gateway.wait_for_event("backend_away", backend="b")
            assert re.search("credentials|user name and password", event["reason"])
            for _ in range(3):
                assert answers(gateway, device, ["x"]) == ["error 1 unavailable"]
            assert len(gateway.events("backend_away")) == 1
        log = gateway.log_path.read_text()
    assert "wrong-password" not in log
    assert LOGIN not in log


def test_a_stream_with_a_proxy_header(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.settimeout(10)
        gateway = new_gateway(
            tmp_path / "gw",
            routes='[[routes]]\nname = "s"\nframing = "stream"\nbackend = "tcp"\n',
            backends=backend(
                "tcp",
                {"kind": "tcp", "url": f"tcp://127.0.0.1:{service.getsockname()[1]}", "proxy_protocol": True},
            ),
        )
        meter = gateway.add_device("meter-7")
        with running(gateway):
            device = RawDevice(gateway.port(), meter)
            connection, _ = service.accept()
            with connection, device:
                connection.settimeout(10)
                head = connection.recv(16, socket.MSG_WAITALL)
                body = connection.recv(int.from_bytes(head[14:16]), socket.MSG_WAITALL)
                assert head[12:14] == b"\x21\x11"
                assert body[:4] == body[4:8] == socket.inet_aton("127.0.0.1")
                assert int.from_bytes(body[10:12]) == gateway.port()
                tlvs = b"\xe4\x00\x07default\xe5\x00\x07meter-7\xe6\x00\x07meter-7"
                assert body[12:] == tlvs
                device.send(b"hello")
                assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
