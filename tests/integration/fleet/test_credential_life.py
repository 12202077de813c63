"""The life of credentials on a running gateway with two workers: what ends sessions, and what lets devices in."""

import datetime as dt
import functools
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, update

from gateway.config import load
from gateway.registry import schema
from gateway.registry.database import make_engine, write
from gateway.registry.devices import DeviceChanges
from gateway.registry.ledger import note_change
from gateway.registry.store import NewCredential
from tests.support.gateway import Gateway, gatewayctl, new_gateway, running, wait_for
from tests.support.psk_device import Session, hint_of, is_accepted

SECRET = "ab" * 32


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Serves the realm `default` on `tls`, and `factory`, whose keys are derived, on `derived`."""
    gateway = new_gateway(
        tmp_path_factory.mktemp("life") / "gateway",
        node="workers = 2",
        listener='[[listeners]]\nname = "derived"\nbind = "127.0.0.1:0"\nrealm = "factory"',
    )
    document = json.loads(
        gateway.ctl(
            "add-realm", "factory", "--key-source", "derived-hmac", "--secret-stdin", "--json", input=SECRET
        ).stdout
    )
    assert "secret" not in document
    with running(gateway):
        yield gateway
        assert not gateway.complaints()


def ctl(gateway: Gateway, *arguments: object) -> Any:
    return json.loads(gateway.ctl(*map(str, arguments), "--json").stdout)


def derived(identity: str) -> str:
    """As the factory computes it."""
    return hmac.digest(bytes.fromhex(SECRET), identity.encode(), "sha256").hex()


def test_a_rotated_key_works_beside_the_old_until_the_grace_time_is_over(gateway: Gateway) -> None:
    device = gateway.add_device("rotating")
    wait_for(lambda: is_accepted(gateway.port(), device.identity, device.key), 2)
    with Session(gateway.port(), device.identity, device.key) as old, gateway.registry() as registry:
        assert old.ask(b"old") == b"ok 1"
        rotated = registry.rotate_key("default", "rotating", NewCredential(grace=dt.timedelta(seconds=4)))
        key = rotated.key.hex()
        ((identity, end),) = rotated.old
        assert (rotated.identity, identity) == ("rotating.2", "rotating")
        wait_for(lambda: is_accepted(gateway.port(), "rotating.2", key), 3)
        assert old.is_open()
        assert 0 <= old.wait_until_ended() - end.timestamp() < 1
        newest = list(registry.audit_rows(newest=1))
        assert [row.action for row in newest] == ["rotate-key"], "nothing was written when the old one ended"
    assert not is_accepted(gateway.port(), device.identity, device.key)
    assert is_accepted(gateway.port(), "rotating.2", key)
    shown = ctl(gateway, "show-device", "rotating")
    assert [(each["identity"], each["state"]) for each in shown["credentials"]] == [
        ("rotating", "expired"),
        ("rotating.2", "active"),
    ]
    assert gateway.metric("pskgw_revocation_seconds_count") >= 1


def test_revoking_one_identity_ends_its_sessions_and_no_other(gateway: Gateway) -> None:
    device = gateway.add_device("revoked")
    rotated = ctl(gateway, "rotate-key", "revoked")
    wait_for(lambda: is_accepted(gateway.port(), rotated["identity"], rotated["key"]), 2)
    with (
        Session(gateway.port(), device.identity, device.key) as old,
        Session(gateway.port(), rotated["identity"], rotated["key"]) as new,
    ):
        gateway.ctl("revoke-key", "revoked")
        old.wait_until_ended(1)
        assert new.ask(b"still here") == b"ok 1"
    assert not is_accepted(gateway.port(), device.identity, device.key)
    assert "was revoked already" in gateway.ctl("revoke-key", "revoked").stdout


def test_a_narrowed_network_and_an_earlier_end_close_sessions(gateway: Gateway) -> None:
    for name, change in (
        ("narrowed", ("--allow-from", "192.0.2.0/24")),
        ("over", ("--not-after", "2020-01-01")),
    ):
        device = gateway.add_device(name)
        wait_for(functools.partial(is_accepted, gateway.port(), device.identity, device.key), 2)
        with Session(gateway.port(), device.identity, device.key) as session:
            gateway.ctl("update-device", name, *change)
            session.wait_until_ended(1)
        assert not is_accepted(gateway.port(), device.identity, device.key)


def test_an_end_that_is_moved_later_is_kept(gateway: Gateway) -> None:
    device = gateway.add_device("longer")
    wait_for(lambda: is_accepted(gateway.port(), device.identity, device.key), 2)
    with Session(gateway.port(), device.identity, device.key) as session, gateway.registry() as registry:
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
        registry.update_device("default", "longer", DeviceChanges(not_after=soon))
        time.sleep(1)
        registry.update_device("default", "longer", DeviceChanges(not_after=None))
        time.sleep(2)  # past the first end: nothing may happen, so there is nothing to wait for
        assert session.ask(b"still here") == b"ok 1"


def test_the_newest_sessions_of_a_device_stay_over_all_workers(gateway: Gateway) -> None:
    device = gateway.add_device("single")
    wait_for(lambda: is_accepted(gateway.port(), device.identity, device.key), 2)
    sessions = [Session(gateway.port(), device.identity, device.key) for _ in range(6)]
    try:
        assert all(session.is_open() for session in sessions)
        gateway.ctl("update-realm", "default", "--sessions-per-device", "2")
        for session in sessions[:4]:
            session.wait_until_ended(2)
        assert [session.is_open() for session in sessions] == [False] * 4 + [True] * 2
        sessions.append(Session(gateway.port(), device.identity, device.key))
        sessions[4].wait_until_ended(1)
        assert [session.is_open() for session in sessions[5:]] == [True, True]
        # A session that was ended is listed until its device has hung up too, or LINGER_S have passed.
        wait_for(lambda: [each["device"] for each in gateway.sessions()].count("single") == 2, 4)
    finally:
        gateway.ctl("update-realm", "default", "--no-sessions-per-device")
        for session in sessions:
            session.close()


def test_a_hint_changes_while_the_gateway_runs(gateway: Gateway) -> None:
    device = gateway.add_device("hinted")
    wait_for(functools.partial(is_accepted, gateway.port(), device.identity, device.key), 2)

    def hint() -> str | None:
        return hint_of(gateway.port(), device.identity, device.key)

    assert hint() is None
    gateway.ctl("update-realm", "default", "--hint", "new hint")
    wait_for(lambda: hint() == "new hint", 2)
    gateway.ctl("update-realm", "default", "--no-hint")
    wait_for(lambda: hint() is None, 2)


def test_derived_keys_are_those_of_the_factory_and_need_a_registered_device(gateway: Gateway) -> None:
    port = gateway.port("derived")
    assert not is_accepted(port, "unit-1", derived("unit-1"))
    added = ctl(gateway, "add-device", "unit-1", "--realm", "factory")
    assert added["key"] == derived("unit-1")
    wait_for(lambda: is_accepted(port, "unit-1", derived("unit-1")), 2)
    rotated = ctl(gateway, "rotate-key", "unit-1", "--realm", "factory", "--identity", "unit-1b")
    assert rotated["key"] == derived("unit-1b")
    refused = gateway.ctl(
        "add-device", "unit-2", "--realm", "factory", "--key-stdin", check=False, input="00" * 16
    )
    assert refused.returncode == 1
    assert "are derived (derived-hmac): give no key" in refused.stderr


def test_first_use_adds_a_device_and_a_removed_one_stays_out(gateway: Gateway) -> None:
    port = gateway.port("derived")
    gateway.ctl("update-realm", "factory", "--enroll", "first-use")
    wait_for(lambda: is_accepted(port, "new-1", derived("new-1")), 2)
    assert not is_accepted(port, "new-2", derived("new-3"))
    with Session(port, "new-4", derived("new-4")) as session:
        assert session.ask(b"at once") == b"ok 1"
        wait_for(lambda: gateway.metric("pskgw_enrolments_total", outcome="added") == 2, 5)
        rows = ctl(gateway, "audit-log", "--action", "enrol-device")
        assert sorted((row["actor"], row["subject"]) for row in rows) == [
            ("gateway", "factory/new-1"),
            ("gateway", "factory/new-4"),
        ]
        gateway.ctl("remove-device", "new-4", "--realm", "factory")
        session.wait_until_ended(2)
    for _ in range(3):
        assert not is_accepted(port, "new-4", derived("new-4"))
    gateway.ctl("add-device", "new-4", "--realm", "factory")
    wait_for(lambda: is_accepted(port, "new-4", derived("new-4")), 2)
    listed = {device["device"] for device in ctl(gateway, "list-devices", "--realm", "factory")}
    assert listed == {"unit-1", "new-1", "new-4"}


def test_the_last_use_is_written_once_without_a_row_of_the_audit(gateway: Gateway) -> None:
    device = gateway.add_device("used")
    before = len(ctl(gateway, "audit-log"))
    wait_for(lambda: is_accepted(gateway.port(), device.identity, device.key), 2)

    def last_used() -> Any:
        return ctl(gateway, "show-device", "used")["credentials"][0]["last_used_at"]

    first = wait_for(last_used, 20, "the last use")
    with Session(gateway.port(), device.identity, device.key):
        time.sleep(1)
    assert last_used() == first
    assert len(ctl(gateway, "audit-log")) == before
    assert "used" not in {each["device"] for each in ctl(gateway, "list-devices", "--idle", "1")}


def test_idle_credentials_are_refused_and_live_sessions_are_in_use(gateway: Gateway) -> None:
    idle, live = gateway.add_device("idle"), gateway.add_device("live")
    for device in (idle, live):
        wait_for(functools.partial(is_accepted, gateway.port(), device.identity, device.key), 2)
    gateway.ctl("update-realm", "default", "--idle-days", "30")

    def pass_days(connection: Connection) -> None:
        feed = schema.feed
        connection.execute(update(feed).values(service_day=feed.c.service_day + 31))
        note_change(connection, "realm", 0, 0, dt.datetime.now(dt.UTC))

    engine = make_engine(load(gateway.config).registry.url)
    try:
        with Session(gateway.port(), live.identity, live.key) as session:
            # Both are written as used now, else the days that pass are not those since their use.
            wait_for(lambda: all(last_used(gateway, name) for name in ("idle", "live")), 20)
            gateway.wait_until_followed()  # else a worker reports the use again, on the day that has come
            write(engine, pass_days)
            wait_for(lambda: not is_accepted(gateway.port(), idle.identity, idle.key), 3)
            assert session.ask(b"still here") == b"ok 1"
            wait_for(
                lambda: is_accepted(gateway.port(), live.identity, live.key), 20, "it was in use all the time"
            )
        gateway.wait_for_event("credential_idle", device="idle")
        assert ctl(gateway, "show-device", "idle")["state"] == "idle"
        assert gateway.metric("pskgw_handshakes_total", outcome="expired") >= 1
        rotated = ctl(gateway, "rotate-key", "idle")
        wait_for(functools.partial(is_accepted, gateway.port(), rotated["identity"], rotated["key"]), 2)
    finally:
        engine.dispose()
        gateway.ctl("update-realm", "default", "--no-idle-days")
    wait_for(functools.partial(is_accepted, gateway.port(), idle.identity, idle.key), 2)


def last_used(gateway: Gateway, device: str) -> Any:
    return ctl(gateway, "show-device", device)["credentials"][0]["last_used_at"]


def test_keys_move_to_another_master_key_while_devices_connect(gateway: Gateway) -> None:
    device = gateway.add_device("resealed")
    wait_for(lambda: is_accepted(gateway.port(), device.identity, device.key), 2)
    path = gateway.directory / "master.key"
    old = path.read_text()
    path.write_text("cd" * 32 + "\n" + old)
    wait_for(lambda: len(gateway.events("master_keys_read")) >= 3, 10, "two workers and the follower")
    done = ctl(gateway, "reseal-keys")
    assert done["resealed"] > 4
    assert ctl(gateway, "reseal-keys")["resealed"] == 0
    path.write_text("cd" * 32 + "\n")
    wait_for(lambda: len(gateway.events("master_keys_read")) >= 6, 10)
    for port, identity, key in (
        (gateway.port(), device.identity, device.key),
        (gateway.port("derived"), "new-1", derived("new-1")),
    ):
        wait_for(functools.partial(is_accepted, port, identity, key), 2)
    assert "whole" in gateway.ctl("audit-log", "--verify").stdout
    # By another configuration: the gateway, which reads its key file again and again, must not meet the old key.
    (gateway.directory / "old.key").touch(mode=0o600)
    (gateway.directory / "old.key").write_text(old)
    config = gateway.directory / "old.toml"
    config.write_text(gateway.config.read_text().replace('"master.key"', '"old.key"'))
    wrong = gatewayctl("list-devices", "--config", config, check=False)
    assert wrong.returncode == 1
    assert "does not open this registry" in wrong.stderr


def test_no_key_is_in_any_file(gateway: Gateway) -> None:
    device = gateway.add_device("secret")
    wait_for(lambda: is_accepted(gateway.port(), device.identity, device.key), 2)
    assert_no_key(gateway.directory, [device.key, SECRET, derived("unit-1"), derived("new-1")])


def assert_no_key(directory: Path, keys: list[str]) -> None:
    """No file has one of these keys (given as hex), in hex, base64 or raw."""
    from base64 import b64encode, urlsafe_b64encode

    needles = []
    for key in keys:
        raw = bytes.fromhex(key)
        needles += [raw, key.encode(), key.upper().encode(), b64encode(raw)[:-1], urlsafe_b64encode(raw)[:-1]]
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for needle in needles:
                assert needle not in content, path
