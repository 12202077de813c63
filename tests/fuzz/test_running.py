"""The corpora sent to a gateway that runs: it goes on serving, and complains of nothing."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import load
from gateway.registry.store import NewDevice
from gateway.server.control.channel import CONTROL_SOCKET
from tests.fuzz.targets import corpus_of
from tests.support.devices import TlsDevice, tcp_socket
from tests.support.gateway import Device, Gateway, gatewayctl, new_gateway, running, wait_for


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Device]]:
    gateway = new_gateway(tmp_path_factory.mktemp("fuzz") / "gateway", limits="handshake_timeout_s = 1.0")
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    with running(gateway):
        yield gateway, device
        assert gateway.complaints() == []


def test_hellos(target: tuple[Gateway, Device]) -> None:
    gateway, device = target
    for path in corpus_of("client_hello"):
        with tcp_socket(gateway.port()) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(path.read_bytes())
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
    with TlsDevice.connect(gateway.port(), device) as connected:
        connected.send(b"line\n")
        assert connected.receive_line() == "ok 1"
    wait_for(lambda: gateway.metric("pskgw_connections") == 0, what="all connections gone")


def test_the_control_socket(target: tuple[Gateway, Device]) -> None:
    """Whoever may speak there may also end the gateway; nonsense ends nothing but its own connection."""
    gateway, device = target
    harmless = [path for path in corpus_of("control") if b"Drain" not in path.read_bytes()]
    for path in harmless:
        _say(load(gateway.config).node.data_dir / CONTROL_SOCKET, path.read_bytes())
    with TlsDevice.connect(gateway.port(), device):
        wait_for(
            lambda: (
                '"device": "d"' in gatewayctl("list-sessions", "--json", "--config", gateway.config).stdout
            ),
            what="the session in the list",
        )


def _say(control: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(control))
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
