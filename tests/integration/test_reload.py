"""SIGHUP: another configuration is put in force without a session that feels it; a broken one changes nothing."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.devices import End, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

ROUTES = """
[[routes]]
name = "lines"
framing = "lines"
content_type = "text/plain"
backend = "events"
"""


@pytest.fixture(params=["uvloop", "asyncio"])
def gateway(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    gateway = new_gateway(
        tmp_path / "gateway", node="workers = 2", routes=ROUTES, asyncio_only=request.param == "asyncio"
    )
    with running(gateway):
        yield gateway


@pytest.fixture
def device(gateway: Gateway) -> Device:
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    gateway.wait_until_followed()
    return device


def change(gateway: Gateway, before: str, after: str) -> None:
    text = gateway.config.read_text()
    assert before in text
    gateway.config.write_text(text.replace(before, after))


def reload(gateway: Gateway) -> None:
    """SIGHUP, and wait until it is done."""
    assert gateway.process is not None
    done = len(gateway.events("reloaded"))
    os.kill(gateway.process.pid, signal.SIGHUP)
    wait_for(lambda: len(gateway.events("reloaded")) > done, 20, f"a reload; log: {gateway.log_path}")


def refused(gateway: Gateway) -> str:
    """SIGHUP, and wait until it is refused; the reason."""
    assert gateway.process is not None
    before = len(gateway.events("reload_refused"))
    os.kill(gateway.process.pid, signal.SIGHUP)
    wait_for(lambda: len(gateway.events("reload_refused")) > before, 20, "a refused reload")
    return str(gateway.events("reload_refused")[-1]["reason"])


def talk(device: TlsDevice, number: int) -> None:
    device.send(b"line\n")
    assert device.receive_line() == f"ok {number}"


def test_live_sessions_stay_and_new_ones_get_the_new_tree(gateway: Gateway, device: Device) -> None:
    workers = gateway.worker_pids()
    with TlsDevice.connect(gateway.port(), device) as old:
        talk(old, 1)
        change(gateway, 'backend = "events"', 'backend = "other"')
        change(
            gateway,
            "[backends.events]",
            '[backends.other]\nkind = "file"\npath = "other.jsonl"\n[backends.events]',
        )
        change(gateway, "[limits]", "[limits]\nmessage_bytes_max = 10")
        reload(gateway)
        talk(old, 2)
        with TlsDevice.connect(gateway.port(), device) as new:
            new.send(b"longer than ten\n")
            assert new.receive_line() == "error 1 too_long"
            new.send(b"line\n")
            assert new.receive_line() == "ok 2"
        talk(old, 3)
    assert gateway.worker_pids() == workers
    assert len(gateway.output_events()) == 3
    assert len(gateway.output_events("other.jsonl")) == 1
    assert gateway.metric("pskgw_config_reloads_total", outcome="applied") == 1
    assert gateway.metric("pskgw_config_last_reload_successful") == 1
    assert abs(gateway.metric("pskgw_config_last_reload_success_timestamp_seconds") - time.time()) < 60
    assert gateway.metric("pskgw_process_restarts_total") == 0


def test_sessions_end_when_their_route_or_listener_is_gone(gateway: Gateway, device: Device) -> None:
    change(gateway, "[[routes]]", '[[listeners]]\nname = "second"\nbind = "127.0.0.1:0"\n[[routes]]')
    reload(gateway)
    port = gateway.port("second")
    with TlsDevice.connect(gateway.port(), device) as first, TlsDevice.connect(port, device) as second:
        talk(first, 1)
        talk(second, 1)
        change(gateway, '[[listeners]]\nname = "second"\nbind = "127.0.0.1:0"\n', "")
        reload(gateway)
        assert second.receive_to_end() == b""
        assert second.end is End.NOTIFIED
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        talk(first, 2)
        change(gateway, 'name = "lines"', 'name = "another"')
        reload(gateway)
        assert first.receive_to_end() == b""
        assert first.end is End.NOTIFIED
    with TlsDevice.connect(gateway.port(), device) as again:
        talk(again, 1)
    assert gateway.complaints() == []


def test_log_level_and_admin_address_are_live(gateway: Gateway, device: Device) -> None:
    before = gateway.wait_for_event("admin_listening")["address"]
    change(gateway, 'bind = "127.0.0.1:0"\n[log]', 'bind = "localhost:0"\n[log]')
    change(gateway, 'level = "debug"', 'level = "info"')
    reload(gateway)
    wait_for(lambda: len(gateway.events("admin_listening")) == 2)
    after = gateway.events("admin_listening")[-1]["address"]
    assert after != before
    host, _, port = str(before).rpartition(":")
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
        pass
    with TlsDevice.connect(gateway.port(), device) as session:
        talk(session, 1)
    assert not gateway.events("session_started")
    change(gateway, 'level = "info"', 'level = "debug"')
    reload(gateway)
    with TlsDevice.connect(gateway.port(), device) as session:
        talk(session, 1)
    gateway.wait_for_event("session_started")


def test_a_broken_configuration_changes_nothing(gateway: Gateway, device: Device) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, TlsDevice.connect(gateway.port(), device) as session:
        talk(session, 1)
        good = gateway.config.read_text()
        for before, after, reason in (
            ("[limits]", "[limits]\nconections = 5", "limits.conections"),
            ("[limits]", "[limits", "not valid TOML"),
            ('backend = "events"', 'backend = "nowhere"', "backends.nowhere"),
            ('data_dir = "data"', 'data_dir = "elsewhere"', "node.data_dir"),
            (
                "[[routes]]",
                f'[[listeners]]\nname = "b"\nbind = "127.0.0.1:{taken.getsockname()[1]}"\n[[routes]]',
                "listeners.b.bind",
            ),
            (
                'name = "tls"\nbind = "127.0.0.1:0"',
                f'name = "tls"\nbind = "127.0.0.1:{taken.getsockname()[1]}"',
                "listeners.tls.bind",
            ),
        ):
            change(gateway, before, after)
            assert reason in refused(gateway)
            gateway.config.write_text(good)
        assert gateway.metric("pskgw_config_last_reload_successful") == 0
        assert gateway.metric("pskgw_config_reloads_total", outcome="refused") == 6
        talk(session, 2)
        reload(gateway)
        assert gateway.metric("pskgw_config_last_reload_successful") == 1
        with TlsDevice.connect(gateway.port(), device) as new:
            talk(new, 1)
        talk(session, 3)


def test_changed_node_settings_roll_the_workers(gateway: Gateway, device: Device) -> None:
    workers = gateway.worker_pids()
    received = gateway.metric("pskgw_messages_received_total")
    with TlsDevice.connect(gateway.port(), device) as old:
        talk(old, 1)
        change(gateway, "workers = 2", "workers = 3")
        reload(gateway)
        with TlsDevice.connect(gateway.port(), device) as new:
            talk(new, 1)
            assert old.receive_to_end() == b""
            assert old.end is End.NOTIFIED
            wait_for(lambda: len(gateway.worker_pids()) == 3, what="the old workers are gone")
            assert not set(gateway.worker_pids()) & set(workers)
            talk(new, 2)
            change(gateway, "workers = 3", "workers = 1")
            reload(gateway)
            assert new.receive_to_end() == b""
            for _ in range(20):  # the kernel spreads them over sockets of workers that are not there any more
                with TlsDevice.connect(gateway.port(), device) as each:
                    talk(each, 1)
    wait_for(lambda: len(gateway.worker_pids()) == 1, what="the old workers are gone")
    assert gateway.metric("pskgw_messages_received_total") == received + 23
    assert gateway.metric("pskgw_process_restarts_total") == 0
    assert gateway.complaints() == []


def test_the_gauges_of_a_spool_are_of_all_that_its_route_holds(tmp_path: Path) -> None:
    """What a route held before a reload counts until it is delivered; a route that is not spooled any more has none."""
    spooled = ROUTES.replace('framing = "lines"', 'framing = "lines"\ndelivery = "spooled"')
    gateway = new_gateway(tmp_path / "gateway", routes=f"{spooled}[routes.spool]\nbytes_max = 1048576\n")
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    events = gateway.directory / "events.jsonl"
    events.mkdir()  # the backend is away
    with running(gateway):
        with TlsDevice.connect(gateway.port(), device) as old:
            talk(old, 1)
            change(gateway, "bytes_max = 1048576", "bytes_max = 2097152")
            reload(gateway)
            with TlsDevice.connect(gateway.port(), device) as new:
                talk(new, 1)
            assert gateway.metric("pskgw_outbox_messages", route="lines") == 2
            assert gateway.metric("pskgw_outbox_bytes_max", route="lines") == 2 << 20
            change(gateway, 'delivery = "spooled"', 'delivery = "direct"')
            change(gateway, "[routes.spool]\nbytes_max = 2097152\n", "")
            reload(gateway)
            wait_for(
                lambda: gateway.metric("pskgw_outbox_messages", route="lines") == 2,
                what="the route of the live session takes over what the one after it has left",
            )
            events.rmdir()
            wait_for(lambda: len(gateway.output_events()) == 2, what="both are delivered")
        wait_for(
            lambda: "pskgw_outbox_oldest_seconds{" not in gateway.http("/metrics")[1], what="no gauge is left"
        )
        assert "pskgw_outbox_bytes_max{" not in gateway.http("/metrics")[1]
