"""Spooled routes to real brokers that go away and refuse: acknowledged messages missing at the broker are none.

All brokers are treated at once, behind one gateway with a route for each: what they do takes seconds, and none must
disturb another.
"""

import contextlib
import dataclasses
import datetime as dt
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from gateway.registry.store import NewDevice
from tests.support.backends import Arrived
from tests.support.fleet import Fleet, Verdict, judge
from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.outages import TROUBLES, Trouble
from tests.support.servers import Certificates

DEVICES = 2
"""For each broker."""
RATE = 100
DELIVERED_S = 60
UNSURE_S = 2.0
"""How long before a fault a message may have been sent that is a duplicate after it: batches are out for less."""
Window = tuple[float, float]


@dataclasses.dataclass
class Scenario:
    """What was done to one broker, and what came of it."""

    verdict: Verdict
    duplicated_at: list[float]
    """when the gateway received what arrived more than once, in Unix seconds"""
    windows: list[Window]

    def check(self, kind: str, what: str) -> None:
        verdict = self.verdict.check()
        print(
            f"{kind}, {what}: {verdict.acknowledged} acknowledged, {len(verdict.missing)} missing, "
            f"{len(verdict.disordered)} out of order, {verdict.duplicates} duplicates"
        )
        assert verdict.acknowledged > 200
        outside = [
            at
            for at in self.duplicated_at
            if not any(begin - UNSURE_S <= at <= end + UNSURE_S for begin, end in self.windows)
        ]
        assert not outside, f"{len(outside)} duplicates outside of the retry windows {self.windows}"


class Stage:
    """A gateway, and all brokers that are installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._fleets = 0
        self.troubles: dict[str, Trouble] = {}
        self.absent: dict[str, str] = {}
        self._results: dict[str, dict[str, Scenario]] = {}

    def __enter__(self) -> Self:
        certificates = Certificates(self._folder / "tls")
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda kind: self._start(kind, certificates), TROUBLES))
        self.gateway = self._stack.enter_context(running(self._gateway()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, kind: str, certificates: Certificates) -> None:
        trouble = TROUBLES[kind](self._folder / kind, certificates)
        try:
            self._stack.enter_context(trouble.subject.server)
        except pytest.skip.Exception as exc:
            self.absent[kind] = str(exc)
            return
        trouble.subject.begin()
        self.troubles[kind] = trouble

    def _gateway(self) -> Gateway:
        routes, backends = "", ""
        for kind, trouble in self.troubles.items():
            name = _route(kind)
            routes += (
                f'[[routes]]\nname = "{name}"\nmatch = {{ identity = "{kind}-*" }}\nframing = "lines"\n'
                f'delivery = "spooled"\ncontent_type = "text/plain"\nbackend = "{name}"\n'
            )
            backends += f"[backends.{name}]\n"
            backends += "".join(
                f"{key} = {json.dumps(value)}\n" for key, value in trouble.subject.settings().items()
            )
        return new_gateway(self._folder / "g", routes=routes, backends=backends)

    def result(self, what: str, run: Callable[["Stage"], dict[str, Scenario]], kind: str) -> Scenario:
        """What came of a scenario, which runs for all kinds when the first is asked for."""
        if kind in self.absent:
            pytest.skip(self.absent[kind])
        if what not in self._results:
            self._results[what] = {}  # what fails is not tried again for each kind
            self._results[what] = run(self)
        assert kind in self._results[what], "the run for all kinds has failed"
        return self._results[what][kind]

    def treat(
        self, kinds: list[str], treatment: Callable[[Trouble, "Share"], list[Window]]
    ) -> dict[str, Scenario]:
        """Load all of them, do this to each at the same time, and see what arrived."""
        self._fleets += 1
        names = {kind: {f"{kind}-{self._fleets}-{each}" for each in range(DEVICES)} for kind in kinds}
        added = self.gateway.add_devices(
            *(NewDevice(identity=name) for of_kind in names.values() for name in of_kind)
        )
        self.gateway.wait_until_followed()
        with ThreadPoolExecutor() as threads:
            # One fleet for all: the TLS engine of its devices belongs to one thread.
            with Fleet(self._port, added, rate=RATE) as fleet:
                shares = {kind: Share(fleet, names[kind]) for kind in kinds}
                windows = dict(
                    zip(
                        kinds,
                        threads.map(lambda kind: _apply(treatment, self.troubles[kind], shares[kind]), kinds),
                        strict=True,
                    )
                )
            assert not fleet.errors
            found = threads.map(lambda kind: self._compare(kind, shares[kind], windows[kind]), kinds)
            return dict(zip(kinds, found, strict=True))

    def _compare(self, kind: str, share: "Share", windows: list[Window]) -> Scenario:
        wait_for(
            lambda: self.gateway.metric("pskgw_outbox_messages", route=_route(kind)) == 0,
            DELIVERED_S,
            f"the spool of {kind} is empty",
        )
        deadline = time.monotonic() + DELIVERED_S
        while True:  # a subscriber gets it a while after the broker has it
            arrived = self.troubles[kind].fetch()
            events = [_event(each) for each in arrived if each.attributes["device"] in share.names]
            verdict = judge(share.acknowledged(), events)
            if not verdict.missing or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        last = {event["id"]: index for index, event in enumerate(events)}
        repeated = [event for index, event in enumerate(events) if last[event["id"]] != index]
        times = [dt.datetime.fromisoformat(event["time"]).timestamp() for event in repeated]
        return Scenario(verdict, times, windows)

    def _port(self) -> int | None:
        found = [entry for entry in self.gateway.events("listening") if entry["listener"] == "tls"]
        return int(found[-1]["address"].rpartition(":")[2]) if found else None


@dataclasses.dataclass(frozen=True)
class Share:
    """The devices of a fleet that send to one broker."""

    fleet: Fleet
    names: set[str]

    def acknowledged(self) -> list[str]:
        return [each for each in self.fleet.acknowledged.copy() if each.partition("/")[0] in self.names]

    def wait_for_acknowledged(self, more: int) -> None:
        goal = len(self.acknowledged()) + more
        wait_for(lambda: len(self.acknowledged()) >= goal, 60, f"{more} acknowledgements")


def _apply(
    treatment: Callable[[Trouble, Share], list[Window]], trouble: Trouble, share: Share
) -> list[Window]:
    share.wait_for_acknowledged(50)
    windows = treatment(trouble, share)
    share.wait_for_acknowledged(50)
    return windows


def _route(kind: str) -> str:
    return kind.replace(".", "")


def _event(arrived: Arrived) -> dict[str, Any]:
    return {**arrived.attributes, "data": arrived.payload.decode()}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("brokers")) as stage:
        yield stage


def stopped(stage: Stage, rounds: int, outage_s: float) -> dict[str, Scenario]:
    def treatment(trouble: Trouble, share: Share) -> list[Window]:
        windows = []
        for _ in range(rounds):
            begin = time.time()
            trouble.stop()
            time.sleep(outage_s)  # the outage itself
            share.wait_for_acknowledged(50)
            trouble.start()
            windows.append((begin, time.time()))
            share.wait_for_acknowledged(50)
        return windows

    return stage.treat(list(stage.troubles), treatment)


def refused(stage: Stage, rounds: int) -> dict[str, Scenario]:
    def treatment(trouble: Trouble, share: Share) -> list[Window]:
        windows = []
        for _ in range(rounds):
            begin = time.time()
            trouble.refuse()
            share.wait_for_acknowledged(300)
            trouble.accept()
            windows.append((begin, time.time()))
            share.wait_for_acknowledged(200)
        return windows

    return stage.treat([kind for kind, each in stage.troubles.items() if each.how_refusing], treatment)


def killed(stage: Stage, times: int) -> dict[str, Scenario]:
    """One kill concerns all routes: the first kind does it, the others are under load meanwhile."""
    windows: list[Window] = []
    done = threading.Event()
    first = next(iter(stage.troubles))

    def treatment(trouble: Trouble, share: Share) -> list[Window]:
        if trouble is not stage.troubles[first]:
            assert done.wait(120)
            return windows
        try:
            for _ in range(times):
                share.wait_for_acknowledged(100)
                time.sleep(random.uniform(0, 0.5))  # at any moment
                begin = time.time()
                stage.gateway.lose()
                stage.gateway.start()
                windows.append((begin, time.time()))
        finally:
            done.set()
        return windows

    return stage.treat(list(stage.troubles), treatment)


@pytest.mark.parametrize("kind", TROUBLES)
def test_broker_stopped_under_load(stage: Stage, kind: str) -> None:
    stage.result("stopped", lambda stage: stopped(stage, 1, 5), kind).check(kind, "stopped for 5 s")


@pytest.mark.parametrize("kind", [kind for kind, each in TROUBLES.items() if each.how_refusing])
def test_broker_that_alternately_refuses_and_accepts(stage: Stage, kind: str) -> None:
    scenario = stage.result("refused", lambda stage: refused(stage, 3), kind)
    scenario.check(kind, f"refusing 3 times: {TROUBLES[kind].how_refusing}")
    route = _route(kind)
    assert stage.gateway.metric("pskgw_outbox_dead_letters", route=route) == 0
    assert [each for each in stage.gateway.events("backend_away") if each.get("backend") == route]


@pytest.mark.parametrize("kind", TROUBLES)
def test_gateway_killed_under_load(stage: Stage, kind: str) -> None:
    stage.result("killed", lambda stage: killed(stage, 3), kind).check(kind, "gateway killed 3 times")


@pytest.mark.prove
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", TROUBLES)
def test_broker_stopped_for_two_minutes(stage: Stage, kind: str) -> None:
    stage.result("stopped long", lambda stage: stopped(stage, 1, 120), kind).check(kind, "stopped for 120 s")
