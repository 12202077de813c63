"""The tcp backend: TLS, mutual TLS and the PROXY header."""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import BackendUnavailable
from gateway.forward.backends.tcp import TcpBackend, TcpSettings
from gateway.forward.session import DeviceInfo
from gateway.net.poller import Poller
from gateway.wire.proxy_protocol import encode_proxy_header
from tests.support.servers import Certificates

INFO = DeviceInfo(
    "default", "meter-7", "identity-7", None, "s", {}, peer=("192.0.2.9", 1234), local=("192.0.2.1", 8883)
)
HEADER = encode_proxy_header(INFO.peer, INFO.local, {0xE4: b"default", 0xE5: b"meter-7", 0xE6: b"identity-7"})


class Collector(asyncio.Protocol):
    """The device's side of a session, as far as a backend sees it."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.transport: asyncio.Transport
        self.gone = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(b"ping")

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.received.endswith(b"done"):
            self.transport.close()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.gone.set()


@asynccontextmanager
async def service(
    certificates: Certificates | None, *, header: bool, address: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """Reads the header where there is one (in plain, before TLS), then answers `ping` with `done`."""
    context = None
    if certificates is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates.ca))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(certificates.server, certificates.server_key)

    def serve(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(5)
            try:
                if header:
                    assert sock.recv(len(HEADER), socket.MSG_WAITALL) == HEADER
                if context is not None:
                    sock = context.wrap_socket(sock, server_side=True)
                with sock:
                    assert sock.recv(4) == b"ping"
                    sock.sendall(b"done")
                    sock.recv(1)
            except OSError:
                pass  # the client did not like us

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed: the test is over
            serve(sock)

    with socket.create_server((address, 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            await asyncio.to_thread(accepting.join)


async def exchange(settings: dict[str, Any]) -> bytes:
    backend = TcpBackend("b", TcpSettings.model_validate({"kind": "tcp", "connect_timeout_s": 1} | settings))
    protocol = Collector()
    poller = Poller(asyncio.get_running_loop())
    await backend.towards(INFO).connect(poller, protocol)
    await asyncio.wait_for(protocol.gone.wait(), 10)
    poller.close()
    return bytes(protocol.received)


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("tls", [False, True])
def test_exchange(tmp_path: Path, header: bool, tls: bool) -> None:
    certificates = Certificates(tmp_path) if tls else None

    async def test() -> None:
        async with service(certificates, header=header) as port:
            scheme = "tls" if tls else "tcp"
            files = certificates.settings if certificates else {}
            settings = {"url": f"{scheme}://127.0.0.1:{port}", "proxy_protocol": header} | files
            assert await exchange(settings) == b"done"

    asyncio.run(test())


@pytest.mark.parametrize("header", [False, True])
def test_certificates_that_do_not_fit(tmp_path: Path, header: bool) -> None:
    certificates = Certificates(tmp_path)

    async def test() -> None:
        async with service(certificates, header=header) as port:
            settings = {"url": f"tls://127.0.0.1:{port}", "proxy_protocol": header} | certificates.settings
            with pytest.raises(BackendUnavailable, match="its certificate is not accepted"):
                await exchange(settings | {"ca_file": str(certificates.other_ca)})
            with pytest.raises(BackendUnavailable, match="does not exist"):
                await exchange(settings | {"ca_file": "/nonexistent"})

    asyncio.run(test())


@pytest.mark.parametrize("header", [False, True])
def test_a_certificate_of_another_name(tmp_path: Path, header: bool) -> None:
    """Signed by the right authority, for localhost and 127.0.0.1."""
    certificates = Certificates(tmp_path)

    async def test() -> None:
        async with service(certificates, header=header, address="127.0.0.9") as port:
            settings = {"url": f"tls://127.0.0.9:{port}", "proxy_protocol": header} | certificates.settings
            with pytest.raises(BackendUnavailable, match="its certificate is not accepted"):
                await exchange(settings)

    asyncio.run(test())


def test_a_name_is_asked_for_once_by_sessions_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take its addresses in turns; when one leads nowhere, the name is asked for again."""
    asked: list[str] = []
    opened: list[Collector] = []

    def collector() -> Collector:
        opened.append(Collector())
        return opened[-1]

    def resolve(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        there = [(socket.AF_INET, *kind, (address, port)) for address in ("127.0.0.1", "127.0.0.2")]
        return [(socket.AF_INET6, *kind, ("::1", port, 0, 0)), *there]

    async def begin(backend: TcpBackend, poller: Poller) -> OSError | str | None:
        """The address that a session was connected to, why not, or None for nothing tried."""
        done = asyncio.get_running_loop().create_future()
        protocol = Collector()
        if backend.begin(poller, protocol, INFO, done.set_result) is None:
            return None
        error: OSError | None = await done
        if error is not None:
            return error
        opened.append(protocol)
        return str(protocol.transport.get_extra_info("peername")[0])

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            other = socket.create_server(("127.0.0.2", port))
            backend = TcpBackend("b", TcpSettings(kind="tcp", url=f"tcp://service.example:{port}"))
            poller = Poller(asyncio.get_running_loop())
            assert await begin(backend, poller) is None
            await backend.connect(poller, collector())
            assert [await begin(backend, poller) for _ in range(3)] == ["127.0.0.2", "127.0.0.1", "127.0.0.2"]
            assert asked == ["service.example"]
            other.close()
            assert await begin(backend, poller) == "127.0.0.1"
            assert isinstance(await begin(backend, poller), ConnectionRefusedError)
            assert await begin(backend, poller) is None
            await backend.connect(poller, collector())
            assert asked == ["service.example"] * 2
            monkeypatch.setattr("gateway.forward.backends.tcp._KNOWN_S", -1.0)  # the two seconds are over
            await backend.connect(poller, collector())
            assert await begin(backend, poller) is None
            for protocol in opened:
                protocol.transport.abort()
            await asyncio.sleep(0)  # in which their sockets are closed
            poller.close()

    monkeypatch.setattr(socket, "getaddrinfo", resolve)  # no name here has several addresses
    asyncio.run(test())


def test_a_service_that_is_away() -> None:
    async def test() -> None:
        async with service(None, header=True) as port:
            pass
        with pytest.raises(BackendUnavailable, match="Connection refused"):
            await exchange({"url": f"tcp://127.0.0.1:{port}", "proxy_protocol": True})

    asyncio.run(test())
