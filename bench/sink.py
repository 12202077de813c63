"""An HTTP server that takes batches of CloudEvents and counts them: `python -m bench.sink PORT`. Cheap, and not measured.

GET answers how many came.
"""

import asyncio
import sys
from typing import cast

from gateway.net import loop

_received = 0


class Sink(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (head := self.buffer.find(b"\r\n\r\n")) >= 0:
            _, found, rest = self.buffer[:head].lower().partition(b"content-length:")
            end = head + 4 + (int(rest.split(b"\r\n")[0]) if found else 0)
            if len(self.buffer) < end:
                return
            self._take(bytes(self.buffer[:end]))
            del self.buffer[:end]

    def _take(self, request: bytes) -> None:
        global _received  # noqa: PLW0603 -- the one thing that this program knows
        if request.startswith(b"GET"):
            body = b"%d" % _received
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        else:
            _received += request.count(b'"specversion"')
            self.transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    loop.run(_serve(int(sys.argv[1])))
