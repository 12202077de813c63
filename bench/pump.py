"""`python -m bench.pump PORT VERSION`: the gateway's own parts for sockets and TLS, and nothing of a gateway.

It knows every identity of the fleet, whose key is a hash, and has no scan of the hello, no look-up, limits, deadlines, metrics, log,
routes nor sessions. What it costs is the least that anything on these parts can cost.
"""

import asyncio
import socket
import sys
from typing import Final

from bench import fleet
from gateway.net.acceptor import Acceptor
from gateway.net.loop import freeze, run
from gateway.net.poller import Poller
from gateway.net.stream import SEND_LAST, Stream
from gateway.tls.contexts import ContextStore
from gateway.tls.openssl import Engine, ServerContext
from gateway.tls.profiles import ProfileName

_HINT: Final = "bench"
_BACKLOG: Final = 4096


def _find_key(identity: bytes) -> tuple[bytes, str]:
    return fleet.key(identity.decode("ascii")), "sha256"


class Pump(asyncio.Protocol):
    """One connection: handshake, then the peer's close_notify, then ours."""

    __slots__ = ("_context", "_engine", "_is_established", "_stream")

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._engine: Engine | None = None
        self._is_established = False
        self._stream: Stream

    def connection_made(self, transport: Stream) -> None:  # type: ignore[override]  # asyncio's protocols take any
        self._stream = transport

    def data_received(self, data: bytes) -> None:
        engine = self._engine
        if engine is None:
            engine = self._engine = self._context.engine(_find_key)
        engine.feed(data)
        if not self._is_established:
            self._is_established = engine.handshake()
            if output := engine.drain():
                self._stream.write(output)
            self._stream.is_newcomer = not self._is_established
        if self._is_established and engine.has_input and engine.read() is None:
            engine.shutdown()
            self._stream.write(engine.drain(), SEND_LAST)
            self._stream.close()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio has it
        if self._engine is not None:
            self._engine.free()


async def _serve(port: int, version: str) -> None:
    contexts = ContextStore().contexts(ProfileName.COMPATIBLE, _HINT, ())
    context = contexts.tls13("sha256") if version == "1.3" else contexts.tls12
    sock = socket.create_server(("127.0.0.1", port))
    Acceptor(Poller(asyncio.get_running_loop()), sock, _BACKLOG, lambda: Pump(context))
    freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    run(_serve(int(sys.argv[1]), sys.argv[2]))
