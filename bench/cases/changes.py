"""How soon a change of the registry is felt: from the commit to the closed session, and to the first accepted handshake."""

import time

from bench import fleet
from bench.errors import BenchError
from bench.generator import Generator, Load
from bench.node import GATEWAY, Gateway
from bench.peers import Running, running
from bench.plan import PSK_GCM, SMALL_FLEET, Work
from bench.registry import REALM
from bench.suite import Suite, timed
from gateway.registry.devices import NewDevice
from gateway.registry.ledger import Author
from gateway.registry.sealing import Key
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry

REVOKED = "revoke to closed session"
ADDED = "add to first accepted handshake"
_NUMBERS = 10_000_000
"""Names of the fleet that load.c can say"""
_ACCEPTED_S = 10.0


def run(suite: Suite) -> None:
    node = suite.node(SMALL_FLEET)
    settings = RegistrySettings(url=node.registry_url, master_key_file=node.master_key_file)
    impatient = {"PSKGW_LIMITS__PENALTY_MAX_S": "0"}  # who tries before it is known would be answered late
    peer = Gateway(suite.scratch / "gateway", node, suite.servers, suite.root, settings=impatient)
    suite.record.versions.update(peer.versions())
    generator = suite.generator(awake=False)
    with Registry(settings, Author("bench", "bench")) as registry, running(peer) as gateway:
        for number in range(suite.rounds):
            suite.say(f"change {number + 1}")
            device = SMALL_FLEET + number
            suite.record.add(ADDED, 1, GATEWAY, {"felt_s": _added(registry, generator, gateway, device)})
            suite.record.add(REVOKED, 1, GATEWAY, {"felt_s": _removed(registry, generator, gateway, device)})


def _added(registry: Registry, generator: Generator, gateway: Running, device: int) -> float:
    identity = fleet.identity(device)
    registry.add_device(NewDevice(identity=identity, realm=REALM, key=Key(fleet.key(identity))))
    with timed() as since:
        while since() < _ACCEPTED_S:
            try:
                generator.run(_only(gateway, device))
            except BenchError:  # not known yet
                time.sleep(0.005)
            else:
                return since()
    raise BenchError(f"the gateway does not know {identity} after {_ACCEPTED_S} s")


def _removed(registry: Registry, generator: Generator, gateway: Running, device: int) -> float:
    """Revoked, and then removed, so that the next run can add it again."""
    identity = fleet.identity(device)
    held = _only(gateway, device, Work.LINE)
    seconds = generator.until_closed(held, lambda: registry.revoke_key(REALM, identity))
    registry.remove_device(REALM, identity)
    return seconds


def _only(gateway: Running, device: int, work: Work = Work.HANDSHAKE) -> Load:
    return Load(gateway.address, PSK_GCM, 1, 1, device, _NUMBERS, work)
