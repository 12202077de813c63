"""PROXY headers of the real HAProxy and nginx, and by hand: the device's own address counts everywhere."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from gateway.wire.proxy_protocol import SIGNATURE, encode_proxy_header
from tests.support.capabilities import missing
from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.servers import free_port

BALANCER = "127.0.0.1"
HEADER_S, TICK_S = 1.0, 0.25
NGINX_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = new_gateway(
        tmp_path_factory.mktemp("balanced") / "gateway",
        listener=f'proxy_protocol_from = ["{BALANCER}"]',
        limits=f"proxy_header_timeout_s = {HEADER_S}\nconnections_per_address = 2",
    )
    with running(gateway):
        yield gateway
        assert gateway.stop() == 0
        assert gateway.complaints() == []


@pytest.fixture(scope="module")
def devices(gateway: Gateway) -> tuple[Device, Device]:
    """One that may come from anywhere, and one that may come from 127.0.7.0/24."""
    anywhere, bound = gateway.add_devices(
        NewDevice(identity="anywhere"), NewDevice(identity="bound", networks=("127.0.7.0/24",))
    )
    gateway.wait_until_followed()
    return anywhere, bound


@contextlib.contextmanager
def balancer(command: list[str], port: int, log: Path) -> Iterator[int]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: _accepts(port), what=f"a balancer that listens; log: {log}")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def haproxy(directory: Path, target: int, word: str) -> contextlib.AbstractContextManager[int]:
    if shutil.which("haproxy") is None:
        missing("haproxy is not installed")
    port = free_port()
    (directory / "haproxy.cfg").write_text(
        "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
        f"frontend in\n  bind 127.0.0.1:{port}\n  default_backend gateway\n"
        f"backend gateway\n  server one 127.0.0.1:{target} {word}\n"
    )
    return balancer(["haproxy", "-db", "-f", str(directory / "haproxy.cfg")], port, directory / "log")


def nginx(directory: Path, target: int) -> contextlib.AbstractContextManager[int]:
    if shutil.which("nginx") is None or not NGINX_MODULE.exists():
        missing("nginx with its stream module is not installed")
    port = free_port()
    (directory / "nginx.conf").write_text(
        f"load_module {NGINX_MODULE};\ndaemon off;\nmaster_process off;\npid {directory}/pid;\n"
        f"error_log {directory}/error.log;\nevents {{ }}\n"
        f"stream {{ server {{ listen 127.0.0.1:{port}; proxy_pass 127.0.0.1:{target}; proxy_protocol on; }} }}\n"
    )
    return balancer(
        ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf")], port, directory / "log"
    )


Start = Callable[[Path, int], contextlib.AbstractContextManager[int]]

BALANCERS = {
    "haproxy-v1": lambda directory, target: haproxy(directory, target, "send-proxy"),
    "haproxy-v2": lambda directory, target: haproxy(directory, target, "send-proxy-v2"),
    "nginx": nginx,
}


@pytest.mark.parametrize("name", BALANCERS)
def test_the_address_behind_a_balancer_is_the_devices(
    gateway: Gateway, devices: tuple[Device, Device], tmp_path: Path, name: str
) -> None:
    anywhere, bound = devices
    start: Start = BALANCERS[name]
    with start(tmp_path, gateway.port()) as port:
        with TlsDevice.connect(port, bound, address="127.0.7.7") as device:
            device.send(b"through the balancer\n")
            assert device.receive_line() == "ok 1"
            (session,) = gateway.sessions()
            assert session["address"] == "127.0.7.7"
        with pytest.raises(Refused):
            TlsDevice.connect(port, bound, address="127.0.8.8")
        gateway.wait_for_event("handshake_failed", address="127.0.8.8", outcome="address_refused")
        wait_for(lambda: gateway.metric("pskgw_connections") == 0, what="all connections gone")
        with contextlib.ExitStack() as held:
            for _ in range(2):  # limits count the device's address, for 127.0.0.1 has more than two
                held.enter_context(TlsDevice.connect(port, anywhere, address="127.0.9.9"))
                held.enter_context(TlsDevice.connect(port, anywhere, address="127.0.9.10"))
            with pytest.raises((Refused, ConnectionError)):
                TlsDevice.connect(port, anywhere, address="127.0.9.9")
        gateway.wait_for_event("connection_refused", address="127.0.9.9")
    wait_for(lambda: gateway.metric("pskgw_connections") == 0, what="all connections gone")


def connect_behind(port: int, device: Device, header: bytes, pieces: int = 1) -> TlsDevice:
    """Connect as a balancer does that says `header`, in so many pieces, the last one together with the hello."""
    connected = TlsDevice(port, device)
    size = -(-len(header) // pieces)
    for at in range(0, len(header), size):
        piece = header[at : at + size]
        connected.sock.sendall(piece + (connected.flight() if at + size >= len(header) else b""))
        time.sleep(0.01 * (pieces > 1))
    connected.handshake()
    return connected


SOURCE, DESTINATION = ("2001:db8::7", 40000), ("2001:db8::1", 8883)
HEADERS = {
    "v1": b"PROXY TCP6 2001:db8::7 2001:db8::1 40000 8883\r\n",
    "v2": encode_proxy_header(SOURCE, DESTINATION, {0x04: bytes(20_000)}),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("pieces", [1, 7])
def test_a_header_in_pieces_and_a_hello_right_behind_it(
    gateway: Gateway, devices: tuple[Device, Device], name: str, pieces: int
) -> None:
    with connect_behind(gateway.port(), devices[0], HEADERS[name], pieces) as device:
        device.send(b"served\n")
        assert device.receive_line() == "ok 1"
        assert [session["address"] for session in gateway.sessions()] == ["2001:db8::7"]
    wait_for(lambda: gateway.metric("pskgw_connections") == 0, what="the connection gone")


@pytest.mark.parametrize("header", [SIGNATURE + b"\x20\x00\x00\x00", b"PROXY UNKNOWN\r\n"])
def test_a_balancer_that_names_nobody_stands_for_itself(
    gateway: Gateway, devices: tuple[Device, Device], header: bytes
) -> None:
    with connect_behind(gateway.port(), devices[0], header):
        assert [session["address"] for session in gateway.sessions()] == [BALANCER]
    wait_for(lambda: gateway.metric("pskgw_connections") == 0, what="the connection gone")


def test_from_elsewhere_no_header_is_wanted_and_none_is_taken(
    gateway: Gateway, devices: tuple[Device, Device]
) -> None:
    with TlsDevice.connect(gateway.port(), devices[0], address="127.0.5.5"):
        assert [session["address"] for session in gateway.sessions()] == ["127.0.5.5"]
    with TlsDevice(gateway.port(), devices[0], address="127.0.5.6") as liar:
        liar.sock.sendall(HEADERS["v1"])
        with contextlib.suppress(ConnectionError):
            assert liar.sock.recv(100) == b""
    failure = gateway.wait_for_event("handshake_failed", address="127.0.5.6")
    assert failure["outcome"] == "protocol_error"


def test_a_balancer_without_a_header_is_refused(gateway: Gateway, devices: tuple[Device, Device]) -> None:
    with pytest.raises(Refused) as refused:
        TlsDevice.connect(gateway.port(), devices[0])
    assert refused.value.alert is None
    failure = gateway.wait_for_event("handshake_failed", address=BALANCER, outcome="protocol_error")
    assert "PROXY header" in str(failure["reason"])


def test_no_byte_extends_the_time_of_the_header(gateway: Gateway) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", gateway.port()), timeout=10) as trickling:
        with pytest.raises(ConnectionError):
            _trickle(trickling, HEADERS["v1"], HEADER_S / 10)
        assert HEADER_S - 0.1 <= time.monotonic() - began < HEADER_S + TICK_S + 1
    failure = gateway.wait_for_event("handshake_failed", outcome="timeout")
    assert failure["address"] == BALANCER


def _trickle(sock: socket.socket, data: bytes, every_s: float) -> None:
    for index in range(len(data)):
        sock.sendall(data[index : index + 1])
        time.sleep(every_s)


def test_a_balancer_that_hangs_up_leaves_nothing_behind(gateway: Gateway) -> None:
    before = gateway.metric_by("outcome", "pskgw_handshakes_total")["peer_closed"]
    with socket.create_connection(("127.0.0.1", gateway.port())) as probe:
        probe.sendall(b"PROXY")
    wait_for(
        lambda: gateway.metric_by("outcome", "pskgw_handshakes_total")["peer_closed"] == before + 1,
        what="the probe counted",
    )
    assert gateway.metric("pskgw_connections") == 0
