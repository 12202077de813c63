"""Spooled routes to a real HTTP server that goes away, refuses now and then, or never answers."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.device import RawDevice
from tests.support.fleet import Fleet, Verdict, judge
from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.servers import Certificates, HttpServer

DELIVERED_S = 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    folder = tmp_path / "http"
    folder.mkdir()
    server = HttpServer(folder, Certificates(folder / "tls"))
    server.mood_path.write_text("200")
    with server:
        yield server


def http_gateway(
    directory: Path, server: HttpServer, *, delivery: str = "spooled", more: str = ""
) -> Gateway:
    return new_gateway(
        directory,
        routes=f"""
[[routes]]
name = "readings"
framing = "lines"
delivery = "{delivery}"
content_type = "text/plain"
backend = "web"
{more}
""",
        backends=f'[backends.web]\nkind = "http"\nurl = "http://127.0.0.1:{server.port}/mood"\n',
    )


def events(server: HttpServer) -> list[dict[str, Any]]:
    return [event for request in server.requests() for event in json.loads(request["body"].encode("latin-1"))]


def verdict(gateway: Gateway, fleet: Fleet, server: HttpServer) -> Verdict:
    wait_for(lambda: gateway.metric("pskgw_outbox_messages") == 0, DELIVERED_S, "the spool is empty")
    found = judge(fleet.acknowledged, events(server)).check()
    print(f"{found.acknowledged} acknowledged, {found.delivered} delivered, {found.duplicates} duplicates")
    return found


def stopped(tmp_path: Path, server: HttpServer, rounds: int, outage_s: float) -> None:
    gateway = http_gateway(tmp_path / "g", server)
    fleet_devices = [gateway.add_device(f"d{number}") for number in range(4)]
    with running(gateway):
        port = gateway.port()
        with Fleet(lambda: port, fleet_devices, rate=200) as fleet:
            for _ in range(rounds):
                fleet.wait_for_acknowledged(200)
                server.stop()
                fleet.wait_for_acknowledged(200)
                time.sleep(outage_s)
                server.start()
            fleet.wait_for_acknowledged(200)
        found = verdict(gateway, fleet, server)
        assert not fleet.errors
    assert found.duplicates <= rounds * 500  # the batch that was out when it stopped


def test_server_stopped_under_load(tmp_path: Path, server: HttpServer) -> None:
    stopped(tmp_path, server, 1, 5)


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_server_stopped_for_two_minutes(tmp_path: Path, server: HttpServer) -> None:
    stopped(tmp_path, server, 2, 120)


def test_server_that_alternately_refuses_and_accepts(tmp_path: Path, server: HttpServer) -> None:
    gateway = http_gateway(tmp_path / "g", server)
    fleet_devices = [gateway.add_device(f"d{number}") for number in range(4)]
    with running(gateway):
        port = gateway.port()
        with Fleet(lambda: port, fleet_devices, rate=200) as fleet:
            for mood in ("503", "200", "429", "200", "401", "200"):
                server.mood_path.write_text(mood)
                fleet.wait_for_acknowledged(300)
        found = verdict(gateway, fleet, server)
        assert not fleet.errors
    assert found.duplicates == 0


def test_dead_letters(tmp_path: Path, server: HttpServer) -> None:
    gateway = http_gateway(tmp_path / "g", server)
    meter = gateway.add_device("meter")
    with running(gateway):
        server.mood_path.write_text("422")
        with RawDevice(gateway.port(), meter) as device:
            device.send(b"one\ntwo\nthree\n")
            assert [device.receive_line() for _ in range(3)] == [b"ok 1", b"ok 2", b"ok 3"]
        wait_for(
            lambda: gateway.metric("pskgw_outbox_dead_letters", route="readings") == 3, what="dead letters"
        )
        assert gateway.metric("pskgw_outbox_messages") == 0
        assert gateway.metric("pskgw_outbox_bytes") > 3 * 256

        def listed(*args: object) -> list[dict[str, Any]]:
            found = json.loads(gateway.ctl("list-dead-letters", "--json", *args).stdout)
            assert isinstance(found, list)
            return found

        letters = wait_for(
            lambda: found if len(found := listed()) == 3 else None, what="the commit of the letters"
        )
        assert letters is not None
        assert [letter["payload_base64"] for letter in letters] == ["b25l", "dHdv", "dGhyZWU="]
        assert letters[0]["route"] == "readings"
        assert letters[0]["device"] == "meter"
        assert letters[0]["event"].endswith("-00000000000000000001")
        assert "422" in letters[0]["reason"]
        assert len(listed("--limit", 1)) == 1
        ids = [letter["id"] for letter in letters]
        table = gateway.ctl("list-dead-letters", "--route", "readings").stdout
        assert all(id_ in table for id_ in ids)

        server.mood_path.write_text("200")
        assert json.loads(gateway.ctl("discard-dead-letters", "--json", ids[1]).stdout) == {"discarded": 1}
        assert json.loads(gateway.ctl("retry-dead-letters", "--json", "--all").stdout) == {"retried": 2}
        wait_for(lambda: len(events(server)) == 2, what="the retried")
        assert [event["data"] for event in events(server)] == ["one", "three"]
        assert listed() == []

        for args, text in (
            (("retry-dead-letters", ids[0]), "1 of these ids is not there"),
            (
                ("list-dead-letters", "--route", "reading"),
                "there is no spooled route reading (there is: readings)",
            ),
        ):
            refused = gateway.ctl(*args, check=False)
            assert refused.returncode == 1
            assert refused.stderr.startswith("error: ")
            assert text in refused.stderr
        assert gateway.ctl("discard-dead-letters", check=False).returncode == 2
        assert gateway.ctl("discard-dead-letters", "--all", ids[0], check=False).returncode == 2


def test_dead_letters_outlive_the_gateway(tmp_path: Path, server: HttpServer) -> None:
    gateway = http_gateway(tmp_path / "g", server)
    meter = gateway.add_device("meter")
    with running(gateway):
        server.mood_path.write_text("422")
        with RawDevice(gateway.port(), meter) as device:
            device.send(b"one\n")
            assert device.receive_line() == b"ok 1"
        wait_for(lambda: gateway.metric("pskgw_outbox_dead_letters") == 1, what="the dead letter")
        gateway.stop()
        stopped = gateway.ctl("list-dead-letters", check=False)
        assert stopped.returncode == 1
        assert "start it with `gatewayctl run`" in stopped.stderr
        server.mood_path.write_text("200")
        gateway.start()
        assert gateway.metric("pskgw_outbox_dead_letters") == 1
        assert gateway.ctl("retry-dead-letters", "--all").stdout == "Put back 1 dead letter.\n"
        wait_for(lambda: len(events(server)) == 1, what="the retried")


@pytest.mark.parametrize("delivery", ["direct", "spooled"])
def test_memory_is_bounded_under_a_backend_that_never_answers(
    tmp_path: Path, server: HttpServer, delivery: str
) -> None:
    spool = "[routes.spool]\nbytes_max = 33554432\ndevice_share = 1" if delivery == "spooled" else ""
    gateway = http_gateway(
        tmp_path / "g", server, delivery=delivery, more=f"delivery_timeout_s = 60\n{spool}"
    )
    fleet_devices = [gateway.add_device(f"d{number}") for number in range(10)]
    with running(gateway):
        port = gateway.port()
        (worker,) = (psutil.Process(pid) for pid in gateway.worker_pids())
        before = worker.memory_info().rss
        server.freeze()
        with Fleet(lambda: port, fleet_devices, window=2000, size=2000) as fleet:
            if delivery == "spooled":
                wait_for(lambda: fleet.errors["full"] > 1000, 60, "the spool is full")
            else:
                wait_for(lambda: fleet.connections == 10, 20, "all are connected")
                time.sleep(3)  # they pause: nothing more can be waited for
            grown = worker.memory_info().rss - before
            assert gateway.http("/healthz")[0] == 200
            server.thaw()  # devices that were paused can end
    print(f"{delivery}: {grown >> 20} MiB more")
    # 10 sessions of 256 KiB direct; 16 MiB ready, 8 MiB uncommitted and a batch being sent with a spool: twice that at most
    assert grown < (24 << 20 if delivery == "direct" else 100 << 20)


def test_rates_of_one_device(tmp_path: Path, server: HttpServer) -> None:
    gateway = http_gateway(tmp_path / "g", server, more="device_messages_per_s = 5")
    wild, tame = gateway.add_device("wild"), gateway.add_device("tame")
    with (
        running(gateway),
        RawDevice(gateway.port(), wild) as device,
        RawDevice(gateway.port(), tame) as other,
    ):
        device.send(b"x\n" * 100)
        answers = [device.receive_line().split(b" ") for _ in range(100)]
        assert [number for _, number, *_ in answers] == [b"%d" % number for number in range(1, 101)]
        words = [answer[0] for answer in answers]
        assert words[:50] == [b"ok"] * 50  # ten seconds' worth at once
        assert 45 <= words.count(b"error") <= 50
        assert all(answer[2] == b"rate_limited" for answer in answers if answer[0] == b"error")
        other.send(b"y\n")
        assert other.receive_line() == b"ok 1"
        assert gateway.metric("pskgw_messages_rejected_total", reason="rate_limited") == words.count(b"error")
        with RawDevice(gateway.port(), wild) as again:  # the limit is the device's, not the session's
            again.send(b"x\n" * 20)
            assert [again.receive_line() for _ in range(20)].count(b"error 20 rate_limited") == 1
