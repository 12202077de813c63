"""A network of its own behind one cable, whose packets can be dropped: another machine that loses its power or its network."""

import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.capabilities import Unavailable
from tests.support.services import Behaviour, Service

__all__ = ["FarService", "Network", "network"]

_CLONE_NEWNET: Final = 0x40000000
_numbers = itertools.count()


class Network:
    """A network namespace with `address`, which knows us as `host`."""

    def __init__(self, name: str, host: str, address: str) -> None:
        self.name = name
        self.host = host
        self.address = address

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in it; what sockets it opens there stay there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{self.name}").open() as away:
            assert libc.setns(away.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0

    def drop(self) -> None:
        """Drop every packet, without a word to anybody."""
        rules = "table inet lost { chain in { type filter hook input priority 0; policy drop; }; }"
        self._run("nft", rules)

    def heal(self) -> None:
        """Let packets through again."""
        self._run("nft", "delete table inet lost")

    def _run(self, *command: str) -> None:
        _run("ip", "netns", "exec", self.name, *command)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Raises Unavailable: only root may make one."""
    if os.geteuid() != 0:
        raise Unavailable("a network of its own needs root")
    number = next(_numbers)
    name = f"pskgw{os.getpid()}-{number}"
    third = os.getpid() % 250
    found = Network(name, f"10.213.{third}.{4 * number + 1}", f"10.213.{third}.{4 * number + 2}")
    link = f"pg{os.getpid()}{number}"[-14:]
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "far", "netns", name)
        _run("ip", "address", "add", f"{found.host}/30", "dev", link)
        _run("ip", "link", "set", link, "up")
        for arguments in (
            ("address", "add", f"{found.address}/30", "dev", "far"),
            ("link", "set", "far", "up"),
        ):
            _run("ip", "-n", name, *arguments)
        yield found
    finally:
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        raise Unavailable(f"{command[0]} is not installed") from exc
    if done.returncode:
        raise Unavailable(f"no networks here: {' '.join(command)}: {done.stderr.strip()}")


class FarService(Service):
    """A service in another network."""

    def __init__(self, behaviour: Behaviour, far: Network) -> None:
        super().__init__(behaviour)
        self._network = far

    @property
    def url(self) -> str:
        return f"tcp://{self._network.address}:{self.port}"

    def _listener(self) -> socket.socket:
        with self._network.inside():
            sock = socket.create_server((self._network.address, self.port), backlog=4096)
        sock.setblocking(False)
        return sock
