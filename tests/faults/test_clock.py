"""The clock of the machine is stepped by an hour, forth and back, under a running gateway: only what is about the time of day moves.

libfaketime steps it for the processes of the gateway alone; what measures how long something takes is left as it is.
"""

import datetime as dt
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.support.capabilities import missing
from tests.support.devices import Refused, TlsDevice
from tests.support.fleet import Fleet, judge
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
HOUR_S = 3600
IDLE_S = 3
SPOOLED = """
[[routes]]
name = "readings"
match = { identity = "d?" }
framing = "lines"
delivery = "spooled"
content_type = "text/plain"
backend = "events"
[[routes]]
name = "others"
framing = "lines"
content_type = "text/plain"
backend = "events"
"""


class Clock:
    """The clock of one gateway."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step(0)

    def step(self, offset_s: int) -> None:
        """From now on it is so much ahead, or behind, of the machine's."""
        aside = self.path.with_suffix(".next")
        aside.write_text(f"{offset_s:+d}\n")
        aside.replace(self.path)
        self.offset_s = offset_s

    def now(self) -> float:
        return time.time() + self.offset_s


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if not LIBRARY.exists():
        missing("libfaketime is not installed")
    return Clock(tmp_path / "clock")


@pytest.fixture
def gateway(tmp_path: Path, clock: Clock) -> Iterator[Gateway]:
    gateway = new_gateway(
        tmp_path / "gateway", node="workers = 2", routes=SPOOLED, limits=f"idle_timeout_s = {IDLE_S}"
    )
    gateway.set(
        LD_PRELOAD=str(LIBRARY),
        FAKETIME_TIMESTAMP_FILE=str(clock.path),
        FAKETIME_CACHE_DURATION="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    with running(gateway):
        yield gateway


def stamps(gateway: Gateway) -> float:
    """How far the newest line of the log is from our own time, in seconds."""
    at = dt.datetime.fromisoformat(gateway.events()[-1]["timestamp"])
    return at.timestamp() - time.time()


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S], ids=["forth", "back"])
def test_a_step_of_an_hour(
    gateway: Gateway, clock: Clock, step_s: int, measured: Callable[[str], None]
) -> None:
    (talker, silent, expiring, *devices) = gateway.add_devices(
        NewDevice(identity="talker"),
        NewDevice(identity="silent"),
        NewDevice(identity="expiring", not_after=dt.datetime.now(dt.UTC) + dt.timedelta(minutes=30)),
        *(NewDevice(identity=f"d{number}") for number in range(3)),
    )
    gateway.wait_until_followed()
    port = gateway.port()
    with (
        TlsDevice.connect(port, talker) as session,
        TlsDevice.connect(port, expiring) as ends,
        Fleet(gateway.port, devices, rate=50) as fleet,
    ):
        fleet.wait_for_acknowledged(100)
        clock.step(step_s)
        stepped = time.monotonic()
        for number in range(1, 9):  # longer than the idle time-out
            session.send(b"line\n")
            assert session.receive_line() == f"ok {number}"
            if step_s < 0:
                ends.send(b"line\n")
                assert ends.receive_line() == f"ok {number}"
            time.sleep(0.5)
        if step_s > 0:
            assert ends.receive_to_end() == b""  # its key is over, by the new time
            with pytest.raises(Refused):
                TlsDevice.connect(port, expiring)
        with TlsDevice.connect(port, silent) as idle:
            began = time.monotonic()
            assert idle.receive_to_end() == b""
            idle_s = time.monotonic() - began
        late = gateway.add_devices(NewDevice(identity="late"))[0]  # by a program whose clock was not stepped
        wait_for(lambda: _served(port, late), what="a new device is served")
        assert abs(stamps(gateway) - step_s) < 60
        fleet.wait_for_acknowledged(100)
        assert gateway.metric("pskgw_outbox_oldest_seconds") < 5
    wait_for(lambda: gateway.metric("pskgw_outbox_messages") == 0, 30, "the spool is empty")
    events = [event for event in gateway.output_events() if event["data"].count("/") > 1]
    found = judge(fleet.acknowledged, events).check()
    ids = {event["id"].rpartition("-")[0] for event in events}
    assert all(uuid.UUID(session_id).version == 7 for session_id in ids)
    assert len({event["id"] for event in events}) == found.delivered, "no id was given twice"
    measured(
        f"clock stepped by {step_s:+d} s: {found.acknowledged} acknowledged, {len(found.missing)} lost, "
        f"{found.duplicates} twice; idle session ended after {idle_s:.1f} s; {time.monotonic() - stepped:.0f} s watched"
    )
    assert IDLE_S <= idle_s < IDLE_S + 3
    assert not fleet.errors
    assert not fleet.failures
    assert gateway.metric("pskgw_process_restarts_total") == 0
    assert gateway.http("/readyz") == (200, '{"status": "ready"}')


def _served(port: int, device: Device) -> bool:
    try:
        TlsDevice.connect(port, device).close()
    except Refused:
        return False
    return True
