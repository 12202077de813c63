"""A whole worker in this process, and how many calls it makes: a measure of work that no other program disturbs."""

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import gateway
from gateway.cli.run import _supervisor_settings
from gateway.config import load
from gateway.registry.notices import Published
from gateway.registry.records import CredentialRecord, RealmRecord, identity_key
from gateway.registry.replica import FORMAT, ReplicaMeta, create_generation
from gateway.registry.sealing import MasterKey, Sealer, credential_context, secret_context
from gateway.server.control.messages import Drain
from gateway.server.processes.worker import Worker
from gateway.tls.openssl import ClientContext, TlsVersion
from gateway.tls.session import ClientSession, Established

__all__ = ["Calls", "CountedDevice", "client_context", "counted_worker"]

IDENTITY = b"meter-7"
KEY = b"k" * 32
_OURS = str(Path(gateway.__file__).parent)
_OTHERS = ("asyncio", "selectors.py", "contextlib.py", "tests", "logging")
"""The event loop and the test itself."""
_TURNS = 4
"""Turns of the loop within which everything that has come is dealt with."""


class Calls:
    """Calls of Python functions and of C functions from the gateway's code, counted while `counting`."""

    def __init__(self) -> None:
        self.python = 0
        self.c = 0
        self.names: Counter[str] = Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        sys.setprofile(self._count)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if any(part in file for part in _OTHERS) and not file.startswith(_OURS):
            return
        if event == "call":
            self.python += 1
            self.names[frame.f_code.co_qualname] += 1
        elif event == "c_call" and file.startswith(_OURS):
            self.c += 1
            self.names[f"{frame.f_code.co_qualname} -> {argument.__name__}"] += 1


class CountedDevice:
    """A device in the same thread; what the worker does in between is counted."""

    def __init__(self, port: int, context: ClientContext, calls: Calls) -> None:
        self._calls = calls
        self._socket = socket.socket()
        self._socket.connect(("127.0.0.1", port))
        self._socket.setblocking(False)
        self._session = ClientSession(context, lambda _hint: (IDENTITY, KEY, "sha256"))
        self.received = bytearray()
        self.is_established = False
        self.is_ended = False
        self._flush()

    async def wait(self) -> None:
        """Let the worker do what it has to, then take what it sent."""
        with self._calls.counting():
            for _ in range(_TURNS):
                await asyncio.sleep(0)
        with contextlib.suppress(BlockingIOError):
            data = self._socket.recv(1 << 20)
            self.is_ended = not data
            for event in self._session.receive(data):
                if isinstance(event, bytes):
                    self.received += event
                self.is_established |= isinstance(event, Established)
            self._flush()

    async def establish(self) -> None:
        while not self.is_established:
            await self.wait()

    async def exchange(self, data: bytes, is_answered: Callable[[bytearray], bool]) -> None:
        """Send, and wait for the answer."""
        self.received.clear()
        self._session.send(data)
        self._flush()
        deadline = time.monotonic() + 10
        while not is_answered(self.received):
            assert time.monotonic() < deadline
            await self.wait()

    async def close(self) -> None:
        """close_notify and FIN, and wait for the worker's."""
        self._session.close()
        self._flush()
        self._socket.shutdown(socket.SHUT_WR)
        while not self.is_ended:
            await self.wait()
        await self.wait()
        self._socket.close()
        self._session.free()

    def _flush(self) -> None:
        output = self._session.output()
        if output:
            self._socket.sendall(output)


def client_context(version: TlsVersion) -> ClientContext:
    """One suite of one version."""
    if version is TlsVersion.TLS1_3:
        return ClientContext((), ("TLS_AES_128_GCM_SHA256",), lowest=version)
    return ClientContext(("PSK-AES128-GCM-SHA256",), (), highest=version)


@contextlib.asynccontextmanager
async def counted_worker(folder: Path, route: dict[str, Any], backend: dict[str, Any]) -> AsyncIterator[int]:
    """A worker with one device and one route, as shipped; gives its port."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    master_key = folder / "master.key"
    master_key.touch(0o600)
    master_key.write_text("00" * 32)
    config = folder / "gateway.toml"
    config.write_text(
        'node.data_dir = "."\nregistry.url = "sqlite:///registry.db"\nregistry.master_key_file = "master.key"\n'
    )
    listener = {"name": "tls", "bind": f"127.0.0.1:{port}", "profile": "compatible"}
    environment = {
        "PSKGW_LISTENERS": json.dumps([listener]),
        "PSKGW_ROUTES": json.dumps([{"name": "route", "backend": "backend"} | route]),
        "PSKGW_BACKENDS": json.dumps({"backend": backend}),
    }
    settings = _supervisor_settings(load(config, environment)).worker
    ours, theirs = socket.socketpair()
    worker = Worker(settings, "worker-0", 1, theirs, lambda _message: None)
    socket.send_fds(ours, [b"1"], [listening.fileno()])
    worker.take_sockets({"tls": 1})
    serving = asyncio.get_running_loop().create_task(worker.serve())
    await asyncio.sleep(0)
    await worker.handle(Published(str(_replica(folder)), 1))
    yield port
    worker.drain(Drain(0.2))
    await serving
    for each in (listening, ours, theirs):
        each.close()


def _replica(folder: Path) -> Path:
    sealer = Sealer([MasterKey(bytes(32))])
    record = CredentialRecord(
        credential_id=1,
        device_id=1,
        realm_id=1,
        device=IDENTITY.decode(),
        group=None,
        labels={},
        disabled=False,
        revoked=False,
        not_before=None,
        not_after=None,
        networks=(),
        hash="sha256",
        sealed_key=sealer.seal(KEY, credential_context(1, IDENTITY)),
    )
    secrets = {"decoy": sealer.seal(b"d" * 32, secret_context("decoy"))}
    writer = create_generation(folder)
    with writer.batch() as batch:
        batch.put_credentials({identity_key(1, IDENTITY): record})
        batch.replace_realms([RealmRecord(1, "default", "hint")])
        batch.put_meta(ReplicaMeta(FORMAT, "registry", 1, time.time(), secrets))
    generation = writer.generation
    writer.close()
    return generation
