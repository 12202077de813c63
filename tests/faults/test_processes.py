"""Processes that die: the others go on, the dead one is replaced, and nothing that was counted is lost."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gateway.registry.store import NewDevice
from tests.support.devices import End, Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.services import Service, echo
from tests.support.visits import Repeated, Visit, visits_by

WITHIN_S = 2.0
BACK_OFF_FIRST_S = 0.25
START_CPU_S = 2.0
"""A new worker computes until it accepts, so how long that takes by the clock is up to what else the machine does."""
FLEET = 24
VISITORS = 4


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """Two workers, a stream route to an echo service, and a device for each of a fleet."""
    with Service(echo) as service:
        gateway = new_gateway(
            tmp_path / "gateway",
            node="workers = 2",
            routes='[[routes]]\nname = "echo"\nframing = "stream"\nbackend = "echo"\n',
            backends=f'[backends.echo]\nkind = "tcp"\nurl = "{service.url}"\n',
        )
        with running(gateway):
            wait_for(lambda: len(gateway.events("accepting")) == 2, what="both workers accept")
            yield gateway


def test_a_killed_worker_is_replaced_and_the_other_is_not_touched(
    gateway: Gateway, measured: Callable[[str], None]
) -> None:
    port = gateway.port()
    devices = gateway.add_devices(*(NewDevice(identity=f"d{n}") for n in range(FLEET + VISITORS)))
    gateway.wait_until_followed()
    visits: list[Visit] = []
    with contextlib.ExitStack() as stack:
        sessions = {
            device.identity: stack.enter_context(TlsDevice.connect(port, device))
            for device in devices[:FLEET]
        }
        wait_for(lambda: len(gateway.events("session_started")) == FLEET, what="all sessions in the log")
        served_by = {e["device"]: e["process"] for e in gateway.events("session_started")}
        survivors = [sessions[name] for name in sessions if served_by[name] == "worker-1"]
        victims = [sessions[name] for name in sessions if served_by[name] == "worker-0"]
        assert survivors, served_by
        assert victims, served_by

        def converse() -> None:
            for session in survivors:
                session.echo(os.urandom(2_000))

        talking = stack.enter_context(Repeated(converse))
        for device in devices[FLEET:]:
            stack.enter_context(Repeated(visits_by(port, device, visits)))
        wait_for(lambda: len(visits) > 40 and talking.count > 5, what="load")

        killed = gateway.wait_for_event("child_started", child="worker-0")["pid"]
        known = len(gateway.events("session_started"))
        killed_at = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        ended = gateway.wait_for_event("child_ended", child="worker-0", status=-signal.SIGKILL)
        dead_at = time.monotonic()
        wait_for(
            lambda: any(e["process"] == "worker-0" for e in gateway.events("session_started")[known:]),
            what="the successor serves",
        )
        back_after_s = time.monotonic() - killed_at
        successor = psutil.Process(gateway.events("child_started")[-1]["pid"]).cpu_times()
        start_cpu_s = successor.user + successor.system
        rounds = talking.count
        wait_for(lambda: talking.count > rounds + 5, what="the others talk on")
        for victim in victims:
            assert victim.receive_to_end() == b""
    longest_s = max(visit.ended - visit.began for visit in visits)
    failed = [visit for visit in visits if not visit.served]
    measured(
        f"worker killed: served again after {back_after_s:.2f} s ({start_cpu_s:.2f} s of CPU), longest of {len(visits)} visits {longest_s:.2f} s, "
        f"{len(failed)} failed (under way when it died), {len(survivors)} sessions of the other untouched"
    )
    assert ended["restart_in_s"] <= BACK_OFF_FIRST_S
    assert start_cpu_s < START_CPU_S
    assert longest_s < WITHIN_S
    assert len(failed) <= VISITORS
    assert all(visit.began <= dead_at and killed_at <= visit.ended + 0.05 for visit in failed)
    assert len(gateway.worker_pids()) == 2
    assert killed not in gateway.worker_pids()


def test_counters_never_fall(gateway: Gateway) -> None:
    port = gateway.port()
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    gateway.wait_until_followed()
    names = ("pskgw_handshakes_total", "pskgw_received_bytes_total", "pskgw_handshake_duration_seconds_count")
    seen = dict.fromkeys(names, 0.0)

    def scrape() -> None:
        for name in names:
            value = gateway.metric(name)
            assert value >= seen[name], f"{name} fell from {seen[name]} to {value}"
            seen[name] = value

    def visit(count: int) -> None:
        for _ in range(count):
            with TlsDevice.connect(port, device) as connection:
                connection.echo(b"hello")

    with Repeated(scrape):
        for child in ("worker-0", "worker-1"):
            visit(20)
            before = gateway.metric("pskgw_handshakes_total", outcome="ok")
            assert before >= 20
            killed = gateway.wait_for_event("child_started", child=child)["pid"]
            os.kill(killed, signal.SIGKILL)
            gateway.wait_for_event("child_ended", child=child)
            visit(5)
            wait_for(
                lambda before=before: gateway.metric("pskgw_handshakes_total", outcome="ok") == before + 5,  # type: ignore[misc]  # mypy does not infer such lambdas
                what="the sum over both lives",
            )
    assert gateway.metric("pskgw_received_bytes_total") == 50 * 5
    assert gateway.metric("pskgw_process_restarts_total", process="worker") == 2


def test_a_worker_that_does_not_answer_is_told_from_one_that_does(gateway: Gateway) -> None:
    wait_for(lambda: gateway.metric("pskgw_workers", state="ready") == 2, what="two workers")
    frozen = gateway.worker_pids()[0]
    os.kill(frozen, signal.SIGSTOP)
    try:
        assert gateway.metric("pskgw_workers", state="silent") == 1
        assert gateway.metric("pskgw_workers", state="ready") == 1
    finally:
        os.kill(frozen, signal.SIGCONT)
    wait_for(lambda: gateway.metric("pskgw_workers", state="ready") == 2, what="both answer again")


def test_a_killed_follower_is_replaced_and_misses_nothing(
    gateway: Gateway, measured: Callable[[str], None]
) -> None:
    port = gateway.port()
    device, doomed = gateway.add_devices(NewDevice(identity="d"), NewDevice(identity="doomed"))
    gateway.wait_until_followed()
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(TlsDevice.connect(port, doomed))
        killed = gateway.follower_pid()
        killed_at = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        with gateway.registry() as registry:
            registry.remove_device("default", "doomed")
            added = registry.add_device(NewDevice(identity="late"))
        with TlsDevice.connect(port, device) as connection:  # nobody needs the follower to connect
            connection.echo(b"hello")
        assert session.receive_to_end() == b""
        cut_s = time.monotonic() - killed_at
        late = Device(added.identity, added.key.hex())
        wait_for(lambda: _connects(port, late), what="the device that was added meanwhile")
        added_s = time.monotonic() - killed_at
    measured(
        f"follower killed: what was removed was cut off after {cut_s:.2f} s, added served {added_s:.2f} s"
    )
    assert cut_s < WITHIN_S + 1
    assert gateway.follower_pid() != killed
    assert gateway.metric("pskgw_process_restarts_total", process="follower") == 1
    assert gateway.events("worker_not_ready") == []
    assert gateway.http("/readyz") == (200, '{"status": "ready"}')


def test_children_end_when_the_supervisor_is_gone(gateway: Gateway, measured: Callable[[str], None]) -> None:
    port = gateway.port()
    (device,) = gateway.add_devices(NewDevice(identity="d"))
    gateway.wait_until_followed()
    assert gateway.process is not None
    children = gateway.pids()[1:]
    with TlsDevice.connect(port, device) as connection:
        connection.echo(b"hello")
        killed_at = time.monotonic()
        gateway.stop(signal.SIGKILL)
        assert connection.receive_to_end() == b""
        assert connection.end is End.NOTIFIED
        ended_s = time.monotonic() - killed_at
    wait_for(lambda: not any(_is_running(pid) for pid in children), what="all children gone")
    gone_s = time.monotonic() - killed_at
    done = gateway.ctl("list-sessions", check=False)  # its socket is still there
    assert (done.returncode, done.stdout) == (1, "")
    assert "no gateway answers there" in done.stderr
    gateway.start()
    with TlsDevice.connect(gateway.port(), device) as connection:
        connection.echo(b"hello again")
    measured(
        f"supervisor killed: sessions ended with close_notify after {ended_s:.2f} s, all gone after {gone_s:.2f} s, "
        f"served again {time.monotonic() - killed_at:.1f} s after"
    )


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _connects(port: int, device: Device) -> bool:
    try:
        TlsDevice.connect(port, device).close()
    except Refused:
        return False
    return True
