"""One gateway for devices of every kind: a listener as `init` makes it, and one that takes every suite there is."""

import contextlib
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.recipes import free_port, need_program

LISTENERS = """
profile = "compatible"
realms_by_sni = { "small.example" = "small" }
[[listeners]]
name = "everything"
bind = "127.0.0.1:0"
profile = "constrained"
allow_dhe_psk = true
"""

ROUTES = """
[[routes]]
name = "mqtt"
match = {{ group = "mqtt" }}
framing = "stream"
backend = "broker"
[[routes]]
name = "web"
match = {{ group = "web" }}
framing = "stream"
backend = "web"
[[routes]]
name = "lines"
framing = "lines"
content_type = "text/plain"
ack = true
backend = "events"
"""

BACKENDS = """
fsync = "never"
[backends.broker]
kind = "tcp"
url = "tcp://127.0.0.1:{broker}"
[backends.web]
kind = "tcp"
url = "tcp://127.0.0.1:{web}"
"""


class Fleet:
    """The gateway, its services, and devices that are added as they are needed."""

    def __init__(self, gateway: Gateway, broker_port: int, web: "WebService") -> None:
        self.gateway = gateway
        self.web = web
        self._broker_port = broker_port

    def add(self, new: NewDevice) -> Device:
        """A device, known to the gateway by the time this returns."""
        with self.gateway.registry() as registry:
            added = registry.add_device(new)
        wait_for(lambda: self.gateway.metric("pskgw_registry_revision") >= added.sequence)
        return Device(added.identity, added.key.hex())

    @contextlib.contextmanager
    def broker(self, folder: Path) -> Iterator[None]:
        """Mosquitto without TLS, behind the backend `broker`."""
        configuration = folder / "mosquitto.conf"
        configuration.write_text(f"listener {self._broker_port} 127.0.0.1\nallow_anonymous true\n")
        process = subprocess.Popen(
            [need_program("mosquitto"), "-c", configuration],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: _is_listening(self._broker_port), what="mosquitto")
            yield
        finally:
            process.terminate()
            process.wait()


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class WebService(http.server.ThreadingHTTPServer):
    """Keeps what is posted to it, and serves `blob` bytes to who asks."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _WebHandler)
        self.posted: list[tuple[str, bytes]] = []


class _WebHandler(http.server.BaseHTTPRequestHandler):
    server: WebService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, body))
        self._answer(b"stored\n")

    def do_GET(self) -> None:
        self._answer(bytes(int(self.path[1:])))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
        """Nothing to stderr."""


@pytest.fixture(scope="session")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The gateway for recipes and suites."""
    broker_port = free_port()
    with WebService() as web:
        serving = threading.Thread(target=web.serve_forever)
        serving.start()
        try:
            gateway = new_gateway(
                tmp_path_factory.mktemp("devices") / "gateway",
                listener=LISTENERS,
                routes=ROUTES.format(),
                backends=BACKENDS.format(broker=broker_port, web=web.server_port),
            )
            gateway.ctl("add-realm", "small", "--record-bytes-max", "256")
            with running(gateway):
                yield Fleet(gateway, broker_port, web)
                assert gateway.complaints() == []
        finally:
            web.shutdown()
            serving.join()
