"""A TCP proxy in front of a unix socket, that can delay every answer or refuse everybody."""

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

__all__ = ["DelayingProxy"]

_READ_BYTES = 65_536


class DelayingProxy:
    """Forwards TCP connections to a unix socket; each piece of an answer waits `delay_s` on its way back."""

    def __init__(self, target: Path) -> None:
        self.delay_s = 0.0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._target))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            while not self._is_closed:
                for ready in select.select([client, server], [], [], 0.2)[0]:
                    data = ready.recv(_READ_BYTES)
                    if not data:
                        return
                    if ready is server:
                        time.sleep(self.delay_s)
                        client.sendall(data)
                    else:
                        server.sendall(data)
