"""Connect + handshake + close beside Mosquitto, three suites, at 1, 8 and 64 clients; registry of 1,000,000."""

from contextlib import ExitStack

from bench.generator import Generator, Load
from bench.node import Gateway
from bench.peers import MOSQUITTO, Mosquitto, Running, running
from bench.plan import FAR_APART, PEER_DEVICES, PSK_GCM, SMALL_FLEET, SUITES, CipherSuite, Work
from bench.suite import Suite, in_turns

MANY_LINES = f"{MOSQUITTO}, 100,000 lines"
WITH_LINE = f"{PSK_GCM.label}, and one acknowledged line of 64 bytes"
_FULL = ((1, 300), (8, 1000), (64, 3000))
"""Clients at a time, and connections per round with so many: all rounds together stay below the devices of the registry."""
_QUICK = ((1, 100), (8, 300), (64, 1000))
_SLOW_SHARE = 5
"""So many times fewer connections where each takes half a millisecond."""


def run(suite: Suite) -> None:
    node = suite.node(suite.pick(1_000_000, SMALL_FLEET))
    peers = (
        Gateway(suite.scratch / "gateway", node, suite.servers, suite.root),
        Mosquitto(suite.scratch / "mosquitto", PEER_DEVICES, suite.servers),
        Mosquitto(suite.scratch / "many", 100_000, suite.servers, name=MANY_LINES),
    )
    generator = suite.generator()
    for peer in peers:
        suite.record.versions.update(peer.versions())
    suite.record.versions["OpenSSL of the peers and of the load generators"] = generator.openssl_version()
    with ExitStack() as stack:
        suite.say("start")
        bursts = _Bursts(suite, generator)
        servers = [stack.enter_context(running(peer)) for peer in peers]
        for server in servers:
            for cipher in SUITES:
                bursts.warm_up(server, cipher)
        for number in range(suite.rounds):
            bursts.round(number, servers)


class _Bursts:
    """Gives each burst the devices that have not come yet."""

    def __init__(self, suite: Suite, generator: Generator) -> None:
        self._suite = suite
        self._generator = generator
        self._opened: dict[str, int] = {}

    def warm_up(self, server: Running, cipher: CipherSuite) -> None:
        self._generator.run(self._load(server, cipher, 64, self._suite.pick(1000, 200)))

    def round(self, number: int, servers: list[Running]) -> None:
        for cipher in SUITES:
            for clients, connections in self._suite.pick(_FULL, _QUICK):
                for server in in_turns(number, servers):
                    many = server.name == MANY_LINES
                    if not many or clients == 64:
                        count = connections // _SLOW_SHARE if many else connections
                        load = self._load(server, cipher, clients, count)
                        self._suite.handshakes(self._generator, cipher.label, server, load)
        gateway = servers[0]
        load = self._load(gateway, PSK_GCM, 64, self._suite.pick(2000, 1000), Work.LINE)
        self._suite.handshakes(self._generator, WITH_LINE, gateway, load)

    def _load(
        self,
        server: Running,
        cipher: CipherSuite,
        clients: int,
        connections: int,
        work: Work = Work.HANDSHAKE,
    ) -> Load:
        before = self._opened.get(server.name, 0)
        self._opened[server.name] = before + connections
        first = before * FAR_APART % server.devices
        return Load(
            server.address, cipher, clients, connections, first, server.devices, work, stride=FAR_APART
        )
