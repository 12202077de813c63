"""Connect + handshake + close, 64 clients: the gateway, Mosquitto, and between them the gateway's parts alone."""

import sys
from contextlib import ExitStack

from bench.generator import Load
from bench.node import Gateway
from bench.peers import Mosquitto, Running, free_port, running, stopped_on_failure, wait_for_port
from bench.plan import FAR_APART, PEER_DEVICES, SMALL_FLEET, SUITES, TLS13_GCM, CipherSuite
from bench.processes import start_server
from bench.suite import Suite, in_turns

PUMP = "bare pump"
_CLIENTS = 64
_START_S = 20.0


def run(suite: Suite) -> None:
    node = suite.node(SMALL_FLEET)
    generator = suite.generator()
    gateway = Gateway(suite.scratch / "gateway", node, suite.servers, suite.root)
    mosquitto = Mosquitto(suite.scratch / "mosquitto", PEER_DEVICES, suite.servers)
    for peer in (gateway, mosquitto):
        suite.record.versions.update(peer.versions())
    with ExitStack() as stack:
        both = [stack.enter_context(running(peer)) for peer in (gateway, mosquitto)]
        pumps = {
            version: stack.enter_context(running(_Pump(suite, version)))
            for version in sorted({_version(cipher) for cipher in SUITES})
        }
        opened: dict[str, int] = {}
        for number in range(-1, suite.rounds):  # the first warms up
            for cipher in SUITES:
                for server in in_turns(number, [both[0], pumps[_version(cipher)], both[1]]):
                    load = _load(server, cipher, suite.pick(2000, 500), opened)
                    if number < 0:
                        generator.run(load)
                    else:
                        suite.handshakes(generator, cipher.label, server, load)


def _version(cipher: CipherSuite) -> str:
    return "1.3" if cipher is TLS13_GCM else "1.2"


def _load(server: Running, cipher: CipherSuite, connections: int, opened: dict[str, int]) -> Load:
    before = opened.get(server.address, 0)
    opened[server.address] = before + connections
    first = before * FAR_APART % server.devices
    return Load(server.address, cipher, _CLIENTS, connections, first, server.devices, stride=FAR_APART)


class _Pump:
    """bench/pump.py as a peer; one speaks one version, as it does not look into hellos."""

    name = PUMP

    def __init__(self, suite: Suite, version: str) -> None:
        self._root = suite.root
        self._log = suite.scratch / f"pump-{version}.log"
        self._cpus = suite.servers
        self._version = version

    def start(self) -> Running:
        port = free_port()
        server = start_server(
            [sys.executable, "-m", "bench.pump", str(port), self._version],
            log=self._log,
            cpus=self._cpus,
            cwd=self._root,
        )
        with stopped_on_failure(server):
            wait_for_port(server, port, _START_S)
        return Running(self.name, f"127.0.0.1:{port}", SMALL_FLEET, server)

    def versions(self) -> dict[str, str]:
        return {}
