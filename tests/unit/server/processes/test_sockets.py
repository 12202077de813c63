"""What accepted sockets inherit from those that the supervisor binds."""

import os
import socket

from gateway.server.processes.sockets import ListeningSockets
from gateway.server.settings import Address, ListenerSettings

FOUND_MS = 120_000
"""Until a peer that is gone without a word is found, as the documentation says."""


def test_accepted_sockets_find_peers_that_are_gone() -> None:
    sockets = ListeningSockets()
    sockets.bind([ListenerSettings(name="tls", bind=Address("127.0.0.1", 0))], 1).apply()
    listener = socket.socket(fileno=os.dup(sockets.of_worker(0, 1)["tls"][0]))
    try:
        with listener, socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                idle, interval, probes = (
                    accepted.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert (idle + interval * probes) * 1000 == FOUND_MS
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == FOUND_MS
    finally:
        sockets.close()
