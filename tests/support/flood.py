"""`python -m tests.support.flood PORT ADDRESS`: handshakes with unknown identities as fast as the machine makes them.

Until stdin ends; then the number of hellos sent stands on stdout. No answer is waited for: IN_FLIGHT connections later each is reset.
"""

import collections
import contextlib
import select
import socket
import sys

from tests.support.devices import reset
from tests.support.gateway import Device
from tests.support.raw_hello import client_hello

IDENTITIES = 500
IN_FLIGHT = 64
KEY = "5e" * 32


def main() -> None:
    port, address = int(sys.argv[1]), sys.argv[2]
    hellos = [client_hello([Device(f"stranger-{address}-{number}", KEY)]) for number in range(IDENTITIES)]
    flying: collections.deque[socket.socket] = collections.deque()
    print("ready", flush=True)
    sent = 0
    while sent % 64 or not select.select([sys.stdin], [], [], 0)[0]:
        sock = socket.socket()
        flying.append(sock)
        sock.bind((address, 0))
        sock.settimeout(1)
        with contextlib.suppress(OSError):
            sock.connect(("127.0.0.1", port))
            sock.sendall(hellos[sent % IDENTITIES])
        sent += 1
        if len(flying) > IN_FLIGHT:
            reset(flying.popleft())
    print(sent, flush=True)


if __name__ == "__main__":
    main()
