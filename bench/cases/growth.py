"""What grows with what: cost of a handshake by registry, open sessions and workers; memory by sessions; the way back."""

import shutil
import time
from contextlib import ExitStack

from bench.generator import Load
from bench.node import GATEWAY, Gateway
from bench.peers import Running, running
from bench.plan import FAR_APART, PSK_GCM, SMALL_FLEET, Work
from bench.registry import Node
from bench.suite import Suite, burst, in_turns

HANDSHAKES = "connect + handshake + close"
BACK = "all back after a restart"
_CLIENTS = 64
_STORM = 1000
"""Devices that try at a time when all come back"""
_SETTLE_S = 0.5


def by_registry(suite: Suite) -> None:
    sizes = suite.pick((1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000))
    with ExitStack() as stack:
        gateways = []
        for devices in sizes:
            node = suite.node(devices)
            suite.say(f"start with {devices:,} devices")
            peer = Gateway(suite.scratch / str(devices), node, suite.servers, suite.root)
            gateways.append((devices, stack.enter_context(running(peer))))
            suite.record.versions.update(peer.versions())
        _alternately(suite, gateways, suite.pick(3000, 1500))


def by_workers(suite: Suite) -> None:
    node = suite.node(SMALL_FLEET)
    with ExitStack() as stack:
        gateways = []
        for workers in (1, 2):
            own = Node(suite.scratch / f"node-{workers}", node.devices)
            # Two gateways do not share a data folder; each copies its own replica from the registry.
            shutil.copytree(node.folder, own.folder, ignore=shutil.ignore_patterns("data"))
            folder = suite.scratch / str(workers)
            peer = Gateway(folder, own, suite.servers, suite.root, workers=workers)
            gateways.append((workers, stack.enter_context(running(peer))))
            suite.record.versions.update(peer.versions())
        _alternately(suite, gateways, suite.pick(3000, 1500))


def _alternately(suite: Suite, gateways: list[tuple[int, Running]], connections: int) -> None:
    generator = suite.generator()
    for number in range(-1, suite.rounds):  # the first warms up
        for at, gateway in in_turns(number, gateways):
            suite.say(f"{at:,}: round {number + 1}")
            first = (number + 1) * connections * FAR_APART % gateway.devices
            load = Load(
                gateway.address, PSK_GCM, _CLIENTS, connections, first, gateway.devices, stride=FAR_APART
            )
            figures = burst(generator, gateway.server, load)
            if number >= 0:
                suite.record.add(HANDSHAKES, at, gateway.name, figures)


def by_sessions(suite: Suite) -> None:
    """Other devices connect and go while so many sessions of a framed route are open: more and more, on a fresh server each round."""
    steps = suite.pick((0, 1000, 2500, 5000, 10_000), (0, 500, 2000))
    node = suite.node(2 * SMALL_FLEET)
    for number in range(suite.rounds):
        peer = Gateway(suite.scratch / "gateway", node, suite.servers, suite.root)
        suite.record.versions.update(peer.versions())
        with running(peer) as gateway, ExitStack() as stack:
            comers = Load(
                gateway.address, PSK_GCM, _CLIENTS, suite.pick(3000, 1500), SMALL_FLEET, gateway.devices
            )
            suite.generator().run(comers)
            opened = 0
            for sessions in steps:
                suite.say(f"{sessions:,} open sessions, round {number + 1}")
                if sessions > opened:
                    more = _held(gateway, opened, sessions - opened)
                    stack.enter_context(suite.generator().held(more))
                    opened = sessions
                time.sleep(_SETTLE_S)
                memory = {"memory_mib": gateway.server.memory().anonymous / 2**20}
                figures = burst(suite.generator(), gateway.server, comers)
                suite.record.add(HANDSHAKES, sessions, GATEWAY, figures | memory)


def _held(gateway: Running, first: int, sessions: int) -> Load:
    """Each has sent a line, since who sends nothing is not let stay for long."""
    return Load(gateway.address, PSK_GCM, _CLIENTS, sessions, first, gateway.devices, Work.LINE)


def restart(suite: Suite) -> None:
    """From the start of the program until every device has a session; the node knew the fleet before."""
    node = suite.node(SMALL_FLEET)
    generator = suite.generator()
    peer = Gateway(suite.scratch / "gateway", node, suite.servers, suite.root)
    suite.record.versions.update(peer.versions())
    with running(peer):
        pass  # the replica is there from now on
    for number in range(suite.rounds):
        for devices in in_turns(number, suite.pick((1000, 3000, 10_000), (1000,))):
            suite.say(f"{devices:,} devices come back, round {number + 1}")
            with running(peer) as gateway:
                cpu_s, began = gateway.server.cpu_s(), time.monotonic()
                load = Load(gateway.address, PSK_GCM, min(devices, _STORM), devices, 0, gateway.devices)
                with generator.held(load):
                    back_s = time.monotonic() - began
                    figures = {
                        "ready_s": peer.ready_s,
                        "back_s": back_s,
                        "whole_s": peer.ready_s + back_s,
                        "cpu_s": gateway.server.cpu_s() - cpu_s,
                    }
            suite.record.add(BACK, devices, GATEWAY, figures)
