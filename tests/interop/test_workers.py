"""Two workers on one port: the kernel spreads the connections, and the gateway counts as one."""

from collections import Counter
from collections.abc import Iterator

import pytest

from gateway.registry.store import NewDevice
from tests.interop.conftest import Fleet, running_fleet
from tests.support.gateway import new_gateway
from tests.support.peers import node, s_client

CONNECTIONS = 24
"""That all of them come to one of the two workers happens once in eight million runs."""


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    gateway = new_gateway(tmp_path_factory.mktemp("two") / "gateway", node="workers = 2")
    fleet = Fleet(gateway)
    fleet.add(NewDevice(identity="meter"), NewDevice(identity="other"))
    with running_fleet(fleet):
        yield fleet


def test_spread_and_summed(two_workers: Fleet) -> None:
    gateway, device = two_workers.gateway, two_workers["meter"]
    assert len(gateway.worker_pids()) == 2
    before = gateway.metric_by("outcome", "pskgw_handshakes_total")
    with node(two_workers.port, device, connections=CONNECTIONS) as peer:
        for _ in range(CONNECTIONS):
            peer.expect(r"^secure ")
        assert gateway.metric("pskgw_connections") == CONNECTIONS
        sessions = gateway.sessions()
        assert len({session["session"] for session in sessions}) == len(sessions) == CONNECTIONS
        peer.send("one of each\n")
        for _ in range(CONNECTIONS):
            peer.expect(r"^data ok 1\n")
        assert peer.finish() == 0
    for _ in range(3):
        with s_client(two_workers.port, two_workers["other"], "-psk", "00" * 32) as refused:
            assert refused.ended() == 1

    handshakes = gateway.metric_by("outcome", "pskgw_handshakes_total") - before
    assert handshakes == {"ok": CONNECTIONS, "wrong_key": 3}
    assert gateway.metric("pskgw_messages_received_total", route="lines") == CONNECTIONS
    assert gateway.metric("pskgw_messages_delivered_total", route="lines") == CONNECTIONS
    assert gateway.metric("pskgw_handshake_duration_seconds_count") == CONNECTIONS
    of_workers = Counter(entry["process"] for entry in gateway.events("session_started"))
    assert set(of_workers) == {"worker-0", "worker-1"}
    assert of_workers.total() == CONNECTIONS
    assert [event["data"] for event in gateway.output_events()] == ["one of each"] * CONNECTIONS


def test_kick_and_revocation_reach_both(two_workers: Fleet) -> None:
    gateway, device = two_workers.gateway, two_workers["other"]
    with node(two_workers.port, device, connections=CONNECTIONS) as peer:
        for _ in range(CONNECTIONS):
            peer.expect(r"^secure ")
        assert f"Ended {CONNECTIONS} sessions" in gateway.ctl("kick-device", device.identity).stdout
        for _ in range(CONNECTIONS):
            peer.expect(r"^close clean\n")
    with node(two_workers.port, device, connections=CONNECTIONS) as peer:
        for _ in range(CONNECTIONS):
            peer.expect(r"^secure ")
        gateway.ctl("remove-device", device.identity)
        for _ in range(CONNECTIONS):
            peer.expect(r"^close clean\n")
    stopped = {
        entry["process"] for entry in gateway.events("session_stopped") if entry["reason"] == "removed"
    }
    assert stopped == {"worker-0", "worker-1"}
