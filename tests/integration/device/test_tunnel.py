"""Programs that know no TLS reach backends through `gatewayctl tunnel` and a gateway: real ones at both ends."""

import contextlib
import hashlib
import http.server
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.device.conftest import Start, accepts, free_port, key_file, need
from tests.support.gateway import Device, Gateway, gatewayctl, new_gateway, running, wait_for

StartTunnel = Callable[[int, Device], int]

DEPLOY = Path(__file__).parents[3] / "deploy"


def stream_gateway(directory: Path, service_port: int, *, asyncio_only: bool = False) -> Gateway:
    return new_gateway(
        directory,
        routes='[[routes]]\nname = "all"\nframing = "stream"\nbackend = "service"\n',
        backends=f'[backends.service]\nkind = "tcp"\nurl = "tcp://127.0.0.1:{service_port}"\n',
        asyncio_only=asyncio_only,
    )


def test_mosquitto_pub_and_sub(tmp_path: Path, broker: int, start_tunnel: StartTunnel) -> None:
    gateway = stream_gateway(tmp_path / "gateway", broker)
    device = gateway.add_device("meter-7")
    with running(gateway):
        port = start_tunnel(gateway.port(), device)
        for number in (7, 8):
            publish = [need("mosquitto_pub"), "-h", "127.0.0.1", "-p", str(port), "-q", "1", "-r"]
            subprocess.run(
                [*publish, "-t", f"readings/{number}", "-m", f"21.{number}"], check=True, timeout=20
            )
        subscribe = [
            need("mosquitto_sub"),
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-t",
            "readings/#",
            "-C",
            "2",
            "-v",
        ]
        done = subprocess.run(subscribe, check=True, timeout=20, capture_output=True, text=True)
        assert sorted(done.stdout.splitlines()) == ["readings/7 21.7", "readings/8 21.8"]
        assert gateway.metric("pskgw_handshakes_total", outcome="ok") == 3


class Files(http.server.BaseHTTPRequestHandler):
    """Gives a large body, and says the digest of one that it was given."""

    protocol_version = "HTTP/1.1"
    body = os.urandom(1 << 16) * 160  # 10 MiB

    def do_GET(self) -> None:
        self._answer(self.body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(hashlib.sha256(body).hexdigest().encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def website() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def curl(*arguments: object) -> bytes:
    done = subprocess.run(
        [need("curl"), "--silent", "--show-error", "--fail", *map(str, arguments)],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(tmp_path: Path, website: int, start_tunnel: StartTunnel) -> None:
    gateway = stream_gateway(tmp_path / "gateway", website)
    device = gateway.add_device("meter-7")
    with running(gateway):
        port = start_tunnel(gateway.port(), device)
        assert curl(f"http://127.0.0.1:{port}/") == Files.body
        upload = tmp_path / "upload"
        upload.write_bytes(Files.body[::-1])
        digest = hashlib.sha256(Files.body[::-1]).hexdigest().encode()
        assert curl("--data-binary", f"@{upload}", f"http://127.0.0.1:{port}/") == digest
        urls = [f"http://127.0.0.1:{port}/{number}" for number in range(20)]
        assert len(curl("--parallel", *urls)) == 20 * len(Files.body)


@pytest.mark.parametrize("asyncio_only", [False, True], ids=["uvloop", "asyncio"])
def test_both_directions_end_on_their_own(
    tmp_path: Path, start_tunnel: StartTunnel, *, asyncio_only: bool
) -> None:
    """As `nc -N` does: end the input, then wait for the whole answer."""
    with socket.create_server(("127.0.0.1", 0)) as service:

        def serve() -> None:
            connection, _ = service.accept()
            with connection:
                received = b""
                while data := connection.recv(65536):
                    received += data
                connection.sendall(hashlib.sha256(received).digest() + received)

        thread = threading.Thread(target=serve)
        thread.start()
        gateway = stream_gateway(tmp_path / "gateway", service.getsockname()[1], asyncio_only=asyncio_only)
        device = gateway.add_device("meter-7")
        with running(gateway):
            port = start_tunnel(gateway.port(), device)
            data = os.urandom(1_000_000)
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                answer = b""
                while piece := client.recv(65536):
                    answer += piece
            assert answer == hashlib.sha256(data).digest() + data
        thread.join()


def test_a_gateway_that_restarts_and_a_tunnel_that_ends(tmp_path: Path, website: int, start: Start) -> None:
    gateway = stream_gateway(tmp_path / "gateway", website)
    device = gateway.add_device("meter-7")
    port, listening = free_port(), free_port()
    text = gateway.config.read_text()
    gateway.config.write_text(
        text.replace('name = "tls"\nbind = "127.0.0.1:0"', f'name = "tls"\nbind = "127.0.0.1:{port}"')
    )
    tunnel = start(
        "tunnel", "--listen", f"127.0.0.1:{listening}", "--connect", f"127.0.0.1:{port}",
        "--identity", "meter-7", "--key-file", key_file(tmp_path, device),
    )  # fmt: skip
    wait_for(lambda: accepts(listening), what="the tunnel")
    with contextlib.ExitStack() as stack:
        waiting = threading.Thread(target=lambda: curl(f"http://127.0.0.1:{listening}/"))
        waiting.start()  # before there is a gateway
        stack.enter_context(running(gateway))
        waiting.join(20)
        assert not waiting.is_alive()
        assert gateway.stop() == 0
        gateway.start()
        assert curl(f"http://127.0.0.1:{listening}/") == Files.body
    tunnel.send_signal(signal.SIGTERM)
    assert tunnel.wait(10) == 0


def test_check_says_what_was_negotiated(tmp_path: Path, website: int) -> None:
    gateway = stream_gateway(tmp_path / "gateway", website)
    key = key_file(tmp_path, gateway.add_device("meter-7"))
    with running(gateway):
        done = gatewayctl(
            "tunnel", "--check", "--connect", f"127.0.0.1:{gateway.port()}", "--identity", "meter-7", "--key-file", key
        )  # fmt: skip
        assert done.stdout == f"127.0.0.1:{gateway.port()} takes meter-7: TLSv1.3, TLS_AES_128_GCM_SHA256\n"
        key.write_text("00" * 16)
        done = gatewayctl(
            "tunnel", "--check", "--connect", f"127.0.0.1:{gateway.port()}", "--identity", "meter-7", "--key-file", key,
            check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "refused the identity or the key" in done.stderr


def test_a_listen_port_in_use(tmp_path: Path) -> None:
    key = key_file(tmp_path, Device("meter-7", "00" * 16))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = gatewayctl(
            "tunnel", "--listen", f"127.0.0.1:{port}", "--connect", "127.0.0.1:9", "--identity", "meter-7", "--key-file", key,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1:{port}: address already in use: choose another --listen, or stop who has it\n"
    )


def test_more_connections_than_files_allowed(tmp_path: Path) -> None:
    key = key_file(tmp_path, Device("meter-7", "00" * 16))
    done = gatewayctl(
        "tunnel", "--listen", "127.0.0.1:0", "--connect", "127.0.0.1:9", "--identity", "meter-7", "--key-file", key,
        "--connections", 1_000_000_000, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "open files are needed" in done.stderr


def test_the_unit_calls_it_with_options_that_it_has() -> None:
    text = (DEPLOY / "psk-gateway-tunnel.service").read_text()
    (command,) = re.findall(r"^ExecStart=/usr/bin/gatewayctl tunnel (.*)$", text, re.MULTILINE)
    help_text = gatewayctl("tunnel", "--help").stdout
    assert all(option in help_text for option in re.findall(r"--[\w-]+", command))
