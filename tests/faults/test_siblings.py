"""Workers that are stopped, hang or die again and again: the live ones accept for them, and they are replaced."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.devices import TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.services import Service, echo
from tests.support.visits import Repeated, Visit, visits_by

STAND_IN_S = 1.0
"""Until a sibling accepts on the sockets of a worker that does not speak."""
HUNG_S = 10.0
"""Until a worker that does not speak is killed."""
SLACK_S = 1.5
"""What a busy machine adds."""
VISITORS = 6
LIVES = 3

HANG_WHEN_TOLD = """
import signal, time

def hang(number, frame):
    while True:
        time.monotonic()

signal.signal(signal.SIGUSR1, hang)
"""
"""Imported by every Python of the gateway at its start: a worker that gets the signal computes without end in its loop."""


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Three workers, and a stream route to an echo service."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HANG_WHEN_TOLD)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    )
    with Service(echo) as service:
        gateway = new_gateway(
            tmp_path / "gateway",
            node="workers = 3",
            routes='[[routes]]\nname = "echo"\nframing = "stream"\nbackend = "echo"\n',
            backends=f'[backends.echo]\nkind = "tcp"\nurl = "{service.url}"\n',
        )
        with running(gateway):
            wait_for(lambda: len(gateway.events("accepting")) == 3, what="all workers accept")
            yield gateway


@contextlib.contextmanager
def visited(gateway: Gateway, visits: list[Visit]) -> Iterator[list[Device]]:
    """Devices come and go all the while."""
    devices = gateway.add_devices(*(NewDevice(identity=f"d{n}") for n in range(VISITORS)))
    gateway.wait_until_followed()
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(Repeated(visits_by(gateway.port(), device, visits)))
        wait_for(lambda: len(visits) > 5 * VISITORS, what="load")
        yield devices


def last_pid(gateway: Gateway, worker: str) -> int:
    return int([e["pid"] for e in gateway.events("child_started") if e["child"] == worker][-1])


def sessions_of(gateway: Gateway, worker: str, devices: list[Device]) -> Iterator[TlsDevice]:
    """Sessions that this worker serves, without end."""
    for device in itertools.cycle(devices):
        known = len(gateway.events("session_started"))
        session = TlsDevice.connect(gateway.port(), device)
        wait_for(lambda known=known: len(gateway.events("session_started")) > known, what="it is in the log")  # type: ignore[misc]  # mypy does not infer such lambdas
        if gateway.events("session_started")[-1]["process"] == worker:
            yield session
        else:
            session.close()


def test_one_that_is_stopped_and_one_that_hangs(gateway: Gateway, measured: Callable[[str], None]) -> None:
    (device,) = gateway.add_devices(NewDevice(identity="beside"))
    gateway.wait_until_followed()
    visits: list[Visit] = []
    with contextlib.ExitStack() as stack:
        survivor = stack.enter_context(next(sessions_of(gateway, "worker-2", [device])))
        victim = stack.enter_context(next(sessions_of(gateway, "worker-0", [device])))
        stack.enter_context(visited(gateway, visits))
        talking = stack.enter_context(Repeated(lambda: survivor.echo(b"still here")))
        at = time.monotonic()
        stopped, hung = last_pid(gateway, "worker-0"), last_pid(gateway, "worker-1")
        os.kill(stopped, signal.SIGSTOP)
        os.kill(hung, signal.SIGUSR1)
        for lost in ("worker-0", "worker-1"):
            gateway.wait_for_event("stands_in", child="worker-2", of=lost)
        stood_in_s = time.monotonic() - at
        assert gateway.metric("pskgw_workers", state="silent") == 2
        rounds = len(visits), talking.count
        wait_for(lambda: len(visits) > rounds[0] + 20 and talking.count > rounds[1] + 20, what="it goes on")
        assert {stopped, hung} <= set(gateway.worker_pids())
        for lost in ("worker-0", "worker-1"):
            gateway.wait_for_event("child_killed", HUNG_S + 5, child=lost)
            gateway.wait_for_event("stands_down", child="worker-2", of=lost)
        back_s = time.monotonic() - at
        assert victim.receive_to_end() == b""
        rounds = len(visits), talking.count
        wait_for(lambda: len(visits) > rounds[0] + 20 and talking.count > rounds[1] + 20, what="it goes on")
        assert {stopped, hung}.isdisjoint(gateway.worker_pids())
        wait_for(lambda: gateway.http("/readyz") == (200, '{"status": "ready"}'), what="all are ready")
    later = [visit for visit in visits if visit.began > at]
    longest_s = max(visit.ended - visit.began for visit in later)
    failed = [visit for visit in visits if not visit.served]
    measured(
        f"2 of 3 workers stopped and hung: the third accepted for both after {stood_in_s:.2f} s, replaced after "
        f"{back_s:.1f} s; longest of {len(later)} visits begun meanwhile {longest_s:.2f} s; {len(failed)} that were under "
        "way failed"
    )
    assert stood_in_s < STAND_IN_S + SLACK_S
    assert longest_s < STAND_IN_S + SLACK_S
    assert len(failed) <= VISITORS
    assert all(visit.began < at + 0.1 for visit in failed)


def test_one_that_dies_again_and_again(gateway: Gateway, measured: Callable[[str], None]) -> None:
    visits: list[Visit] = []
    with visited(gateway, visits):
        for life in range(LIVES):
            pid = last_pid(gateway, "worker-0")
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda life=life: len(gateway.events("child_ended")) == life + 1, what="it is gone")  # type: ignore[misc]  # mypy does not infer such lambdas
            wait_for(lambda pid=pid: last_pid(gateway, "worker-0") != pid, 20, what="a successor")  # type: ignore[misc]  # mypy does not infer such lambdas
        wait_for(lambda: len(gateway.worker_pids()) == 3, what="three workers")
        gateway.wait_for_event("stands_down", of="worker-0")
    back_offs = [event["restart_in_s"] for event in gateway.events("child_ended")]
    longest_s = max(visit.ended - visit.began for visit in visits)
    failed = [visit for visit in visits if not visit.served]
    measured(
        f"worker killed {LIVES} times: restarted after {back_offs} s; longest of {len(visits)} visits {longest_s:.2f} s, "
        f"{len(failed)} that were under way failed"
    )
    assert all(later == max(2 * before, 0.25) for before, later in itertools.pairwise(back_offs))
    assert longest_s < STAND_IN_S + SLACK_S
    assert len(failed) <= LIVES * VISITORS
