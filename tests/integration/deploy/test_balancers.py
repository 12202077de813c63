"""HAProxy and nginx in front of a gateway by the example files, with addresses of this machine in place of the example's."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.peers import program, s_client
from tests.support.services import unused_port

DEPLOY = Path(__file__).parents[3] / "deploy"
HAPROXY = DEPLOY / "haproxy" / "haproxy.cfg"
NGINX = DEPLOY / "nginx" / "nginx.conf"


def accepted(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def nginx_globals(folder: Path) -> str:
    return f"pid {folder}/nginx.pid; error_log {folder}/nginx.log;"


def test_haproxy_takes_the_example() -> None:
    accepted(program("haproxy"), "-c", "-f", HAPROXY)


def test_nginx_takes_the_example(tmp_path: Path) -> None:
    accepted(program("nginx"), "-t", "-c", NGINX, "-g", nginx_globals(tmp_path))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    listener = 'proxy_protocol_from = ["127.0.0.1/32"]'
    with running(new_gateway(tmp_path / "gateway", listener=listener)) as gateway:
        yield gateway


def haproxy(gateway: Gateway, port: int, folder: Path) -> list[str]:
    """Its command, by the example with one gateway."""
    admin = str(gateway.wait_for_event("admin_listening")["address"]).rpartition(":")[2]
    text = HAPROXY.read_text().replace("bind :8883", f"bind 127.0.0.1:{port}")
    text = text.replace("10.0.0.11:8883", f"127.0.0.1:{gateway.port()}").replace("port 9464", f"port {admin}")
    text = text.replace("maxconn 40000", "maxconn 100")  # tests may not open that many files
    (folder / "haproxy.cfg").write_text(re.sub(r" *server gateway-2 .*\n", "", text))
    return [program("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]


def nginx(gateway: Gateway, port: int, folder: Path) -> list[str]:
    """Its command, by the example with one gateway."""
    text = NGINX.read_text().replace("listen 8883", f"listen 127.0.0.1:{port}")
    text = text.replace("10.0.0.11:8883", f"127.0.0.1:{gateway.port()}").replace(
        "processes auto", "processes 1"
    )
    (folder / "nginx.conf").write_text(re.sub(r" *server 10\.0\.0\.12.*\n", "", text))
    settings = f"{nginx_globals(folder)} daemon off;"
    return [program("nginx"), "-c", str(folder / "nginx.conf"), "-g", settings]


@pytest.mark.parametrize("command", [haproxy, nginx])
def test_a_device_behind_it_is_known_by_its_own_address(
    command: Callable[[Gateway, int, Path], list[str]], gateway: Gateway, tmp_path: Path
) -> None:
    device = gateway.add_device("meter-7", "--allow-from", "127.0.0.9/32")
    gateway.wait_until_followed()
    port = unused_port()
    with (tmp_path / "balancer.log").open("wb") as log:
        balancer = subprocess.Popen(command(gateway, port, tmp_path), stdout=log, stderr=log)
        try:
            wait_for(lambda: is_served(port), 20, "a gateway that the balancer calls ready")
            with s_client(port, device, "-bind", "127.0.0.9:0", "-quiet") as client:
                client.send("21.5\n")
                client.expect("^ok 1\n")
            with s_client(port, device, "-bind", "127.0.0.8:0") as client:
                assert client.ended() != 0
            refused = gateway.wait_for_event("handshake_failed", outcome="address_refused")
            assert refused["address"] == "127.0.0.8"
            assert len(gateway.output_events()) == 1
        finally:
            balancer.terminate()
            balancer.wait(10)


def is_served(port: int) -> bool:
    """Whether a stranger's handshake reaches a gateway, which answers it with an alert."""
    with s_client(port, None, "-tls1_3") as client:
        client.end_input()
        client.ended()
        return "alert" in client.output
