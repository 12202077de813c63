"""What an idle session holds, fresh and after 64 KB both ways, beside Mosquitto and stunnel."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from bench.cases.stream import Stream, finish, opened, streaming
from bench.generator import Load, compiled
from bench.node import GATEWAY, Gateway, stream_settings
from bench.peers import MOSQUITTO, Mosquitto, Peer, Running, Stunnel, echo_service, running
from bench.plan import PEER_DEVICES, PSK_GCM, SMALL_FLEET
from bench.processes import Memory
from bench.suite import Suite

FRESH = "fresh"
MOVED = "after 64 KB both ways"
FRAMED = f"{GATEWAY}, framed"
STREAM = f"{GATEWAY}, stream"
_SESSIONS = 1000
"""Many, since a route holds some messages and a batch however many sessions it has, and they are counted with them."""
_WARM_UP = 16
_SETTLE_S = 0.5
_LINES = 8192
"""Of 7 bytes and a line break, answered with `ok NNNN`: 64 KB either way."""
_WRITE_BYTES = 16 * 1024


def run(suite: Suite) -> None:
    node = suite.node(SMALL_FLEET)
    executable = compiled(suite.root / "bench" / "echo.c", suite.build)
    with echo_service(executable, suite.scratch, suite.load) as service:
        where = (suite.servers, suite.root)
        peers: tuple[tuple[str, Peer], ...] = (
            (FRAMED, Gateway(suite.scratch / "framed", node, *where)),
            (STREAM, Gateway(suite.scratch / "stream", node, *where, settings=stream_settings(service))),
            ("stunnel", Stunnel(suite.scratch / "stunnel", PEER_DEVICES, suite.servers, service)),
            (MOSQUITTO, Mosquitto(suite.scratch / "mosquitto", PEER_DEVICES, suite.servers)),
        )
        for _ in range(suite.rounds):
            for name, peer in peers:
                if suite.quick and name not in (FRAMED, MOSQUITTO):
                    continue
                suite.record.versions.update(peer.versions())
                _fresh(suite, name, peer)
                _moved(suite, name, peer)


def _fresh(suite: Suite, name: str, peer: Peer) -> None:
    sessions = suite.pick(_SESSIONS, 300)
    suite.say(f"{name}: {sessions} idle sessions")
    with running(peer) as server:
        empty = _Empty.of(suite, server)
        load = Load(server.address, PSK_GCM, 16, sessions, 0, server.devices)
        with suite.generator().held(load) as held:
            suite.record.add(FRESH, held, name, empty.figures(held))


def _moved(suite: Suite, name: str, peer: Peer) -> None:
    sessions = suite.pick(_SESSIONS, 50)
    suite.say(f"{name}: {sessions} sessions, 64 KB both ways")
    with running(peer) as server, ExitStack() as stack:
        empty = _Empty.of(suite, server)
        if name in (FRAMED, MOSQUITTO):
            executable = compiled(suite.root / "bench" / "messages.c", suite.build, "-lssl", "-lcrypto")
            sizes = f"--clients {sessions} --count {sessions * _LINES} --size 7 --window 16 --hold".split()
            mqtt = ["--mqtt"] if name == MOSQUITTO else []
            arguments = ["--connect", server.address, *sizes, *mqtt]
            process = stack.enter_context(opened(executable, arguments, suite.load))
        else:
            stream = Stream(sessions, 4 * _WRITE_BYTES, _WRITE_BYTES, 4 * _WRITE_BYTES)
            process = stack.enter_context(streaming(suite, server.address, stream))
        finish(process)
        suite.record.add(MOVED, sessions, name, empty.figures(sessions))


@dataclass(frozen=True, slots=True)
class _Empty:
    """A server to which a few sessions have come and gone."""

    running: Running
    memory: Memory

    @classmethod
    def of(cls, suite: Suite, running: Running) -> Self:
        suite.generator().run(Load(running.address, PSK_GCM, 1, _WARM_UP, 0, running.devices))
        time.sleep(_SETTLE_S)
        return cls(running, running.server.memory())

    def figures(self, sessions: int) -> dict[str, float]:
        """What so many sessions have added since."""
        time.sleep(_SETTLE_S)
        memory = self.running.server.memory()
        return {
            "session_kib": (memory.anonymous - self.memory.anonymous) / sessions / 1024,
            "resident_kib": (memory.resident - self.memory.resident) / sessions / 1024,
            "empty_mib": self.memory.proportional / 2**20,
        }
