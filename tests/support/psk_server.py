"""A TLS-PSK server that does what a test tells it: the gateway's own session, and a script in place of a route."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

from gateway.tls.contexts import ContextStore, RealmContexts
from gateway.tls.profiles import ProfileName
from gateway.tls.session import PeerClosed, PskChoice, ServerSession
from gateway.wire.client_hello import ClientHello, OfferedPsk

__all__ = ["Conversation", "PskServer", "psk_server"]

DECOY = bytes(32)


class PskServer:
    """Who may come, what was said, and who is connected. `script` is called with every piece of data."""

    def __init__(
        self,
        keys: dict[str, bytes],
        script: "Callable[[Conversation, bytes], None]",
        *,
        hint: str | None = None,
    ) -> None:
        self.keys = {identity.encode(): key for identity, key in keys.items()}
        self.script = script
        self.hint = hint
        self.contexts = ContextStore()
        self.conversations: list[Conversation] = []
        self.port = 0

    @property
    def live(self) -> "list[Conversation]":
        """Those that are connected."""
        return [one for one in self.conversations if one.live]


class Conversation(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: PskServer) -> None:
        self.server = server
        self.session = ServerSession(self)
        self.transport: asyncio.Transport
        self.received = b""
        self.live = False
        self.finished = False

    def send(self, data: bytes) -> None:
        """Say something."""
        self.session.send(data)
        self.flush()

    def close(self) -> None:
        """Say goodbye and close."""
        self.session.close()
        self.flush()
        self.transport.close()

    def flush(self) -> None:
        self.transport.write(self.session.output())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.live = True
        self.server.conversations.append(self)

    def data_received(self, data: bytes) -> None:
        for event in self.session.receive(data):
            if isinstance(event, bytes):
                self.received += event
                self.server.script(self, event)
            elif isinstance(event, PeerClosed):
                self.finished = True
                self.close()
        if not self.transport.is_closing():
            self.flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.live = False
        self.session.free()

    def contexts_for(self, hello: ClientHello) -> RealmContexts:  # noqa: ARG002 - there is one realm
        return self.server.contexts.contexts(ProfileName.COMPATIBLE, self.server.hint, ())

    def choose_psk(self, offered: Sequence[OfferedPsk]) -> PskChoice:
        identity = offered[0].identity
        return PskChoice(identity, self.server.keys.get(identity, DECOY), "sha256")


@contextlib.asynccontextmanager
async def psk_server(server: PskServer, port: int = 0) -> AsyncIterator[PskServer]:
    """Let it listen on 127.0.0.1; at the end every connection is cut."""
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Conversation(server), "127.0.0.1", port, reuse_address=True)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for conversation in server.live:
            conversation.transport.abort()
        await asyncio.sleep(0)
