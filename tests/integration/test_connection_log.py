"""The log and the list of sessions tell of each connection, by one id."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.psk_device import is_accepted


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    gateway = new_gateway(tmp_path_factory.mktemp("log") / "gw", node="workers = 2")
    gateway.config.write_text(gateway.config.read_text().replace('level = "debug"', 'level = "info"'))
    with running(gateway):
        yield gateway


def ended(gateway: Gateway, **fields: str) -> dict[str, Any]:
    return gateway.wait_for_event("connection_ended", 10, **fields)


def add(gateway: Gateway, identity: str) -> Device:
    device = gateway.add_device(identity)
    gateway.wait_until_followed()
    return device


def test_a_session_ends_with_one_event_of_all_that_was(gateway: Gateway) -> None:
    device = add(gateway, "whole")
    with TlsDevice.connect(gateway.port(), device) as session:
        session.send(b"one\ntwo\n")
        assert session.receive_lines(2) == ["ok 1", "ok 2"]
        (listed,) = json.loads(gateway.ctl("list-sessions", "--device", "whole", "--json").stdout)
    event = ended(gateway, device="whole")
    assert event["outcome"] == "ok"
    assert event["reason"] == "the device closed"
    assert (event["received_bytes"], event["sent_bytes"], event["messages"]) == (8, 10, 2)
    assert (event["realm"], event["identity"], event["route"]) == ("default", "whole", "lines")
    assert 0 < event["handshake_s"] < 10
    assert 0 < event["session_s"] < 60
    for key in ("connection", "session", "tls_version", "cipher", "listener", "address"):
        assert event[key] == listed[key], key
    assert event["process"] == listed["worker"]
    assert listed["messages"] == 2
    assert 0 <= listed["age_s"] <= event["session_s"] + 1


def test_what_the_log_says_of_one_connection_has_its_id(gateway: Gateway) -> None:
    device = add(gateway, "kicked")
    with TlsDevice.connect(gateway.port(), device) as session:
        gateway.ctl("kick-device", "kicked")
        session.receive_to_end()
    event = ended(gateway, device="kicked")
    assert event["reason"] == "kicked"
    (stopped,) = [each for each in gateway.events("session_stopped") if each["device"] == "kicked"]
    assert stopped["connection"] == event["connection"]
    assert stopped["session"] == event["session"]


def test_a_failed_handshake_ends_with_its_outcome(gateway: Gateway) -> None:
    with pytest.raises(Refused), TlsDevice.connect(gateway.port(), Device("stranger", "00" * 32)):
        pass
    event = ended(gateway, outcome="unknown_identity")
    (failed,) = [each for each in gateway.events("handshake_failed") if each.get("identity") == "stranger"]
    assert failed["connection"] == event["connection"]
    assert event["reason"] == failed["reason"]
    assert "session_s" not in event
    assert "session" not in event


def test_ids_of_connections_are_unique_over_workers(gateway: Gateway) -> None:
    device = add(gateway, "often")
    for _ in range(20):
        TlsDevice.connect(gateway.port(), device).close()

    def of_mine() -> list[dict[str, Any]]:
        return [event for event in gateway.events("connection_ended") if event.get("device") == "often"]

    wait_for(lambda: len(of_mine()) == 20, what="20 events")
    mine = of_mine()
    assert len({event["connection"] for event in mine}) == 20
    assert len({event["process"] for event in mine}) == 2


def test_sessions_are_listed_by_route(gateway: Gateway) -> None:
    with TlsDevice.connect(gateway.port(), add(gateway, "routed")):
        (listed,) = json.loads(
            gateway.ctl("list-sessions", "--route", "lines", "--device", "routed", "--json").stdout
        )
        assert listed["route"] == "lines"
        assert json.loads(gateway.ctl("list-sessions", "--route", "other", "--json").stdout) == []
        header, row = gateway.ctl("list-sessions", "--device", "routed").stdout.splitlines()
    assert header.split() == [
        "REALM", "DEVICE", "ADDRESS", "ROUTE", "AGE", "IN", "OUT", "MESSAGES", "TLS", "SUITE", "WORKER", "CONNECTION",
    ]  # fmt: skip
    assert row.split()[1:4] == ["routed", "127.0.0.1", "lines"]


def test_on_a_console_only_failures_are_shown(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw")
    text = gateway.config.read_text()
    gateway.config.write_text(
        text.replace('level = "debug"', 'level = "info"').replace('"json"', '"console"')
    )
    port = 0
    try:
        gateway.start(wait=False)
        port = wait_for(lambda: _port(gateway), what="the listener")
        wait_for(lambda: "replica_published" in gateway.log_path.read_text(), what="the replica")
        device = gateway.add_device("quiet")
        wait_for(lambda: is_accepted(port, device.identity, device.key), what="the device is known")
        with pytest.raises(Refused), TlsDevice.connect(port, Device("quiet", "00" * 32)):
            pass
        wait_for(lambda: "outcome=wrong_key" in gateway.log_path.read_text(), what="the failure")
        wait_for(lambda: "connection_ended" in gateway.log_path.read_text(), what="its end")
    finally:
        gateway.kill()
    shown = [line for line in gateway.log_path.read_text().splitlines() if "connection_ended" in line]
    assert shown
    assert all("outcome=ok" not in line for line in shown)
    assert "outcome=wrong_key" in shown[-1]


def _port(gateway: Gateway) -> int:
    for line in gateway.log_path.read_text().splitlines():
        if "listener=tls" in line:
            return int(line.partition("address=")[2].split()[0].rpartition(":")[2])
    return 0
