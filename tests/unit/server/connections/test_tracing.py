"""What a worker's tracers follow, and where they stop."""

import dataclasses
from typing import Any, cast

import pytest

from gateway.registry.records import RealmRecord
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.admission.lookup import DeviceLookup
from gateway.server.connections.tracing import (
    CONNECTIONS_BURST,
    CONNECTIONS_PER_S,
    MESSAGES_MAX,
    PENDING_MAX,
    Tracers,
)
from gateway.server.control.trace_messages import KeyLogLine, StartTrace, StopTrace, TraceEvents, TraceMessage
from gateway.server.settings import Address, ListenerSettings
from gateway.telemetry.metrics import Outcome
from gateway.wire.client_hello import ClientHello, OfferedPsk


@dataclasses.dataclass
class Connection:
    """As much of one as a trace looks at."""

    address: str = "192.0.2.1"
    connection_id: str = "c-1"
    listener_name: str = "tls"
    tls_version: str = ""
    cipher: str = ""
    session_id: str = ""
    route_name: str = ""
    received_bytes: int = 0
    sent_bytes: int = 0
    listener_settings: ListenerSettings = dataclasses.field(
        default_factory=lambda: ListenerSettings(name="tls", bind=Address("127.0.0.1", 0))
    )


class EmptyLookup:
    def record(self, _realm_id: int, _identity: bytes) -> None:
        return None


class Stage:
    """Tracers with a clock, and what they told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.told: list[TraceEvents | KeyLogLine] = []
        self.tracers = Tracers(
            self.told.append, cast("DeviceLookup", EmptyLookup()), LimitsSettings(), (), lambda: self.now
        )

    def start(self, target: str, **settings: Any) -> None:
        self.tracers.handle(StartTrace(target, self.now + 60, **settings))

    def accepted(self, address: str = "192.0.2.1") -> Any:
        return self.tracers.accepted(cast("Any", Connection(address)))

    def greeted(self, *identities: bytes, version: int = 0x0303, realm: RealmRecord | None = None) -> Any:
        psks = tuple(OfferedPsk(identity, 32) for identity in identities)
        hello = ClientHello(0x0303, (version,), (), None, (), psks, ())
        return self.tracers.greeted(cast("Any", Connection()), None, hello, realm)

    @property
    def kinds(self) -> list[str]:
        return [
            type(event).__name__
            for told in self.told
            if isinstance(told, TraceEvents)
            for event in told.events
        ]

    @property
    def left_out(self) -> int:
        return sum(told.left_out for told in self.told if isinstance(told, TraceEvents))


def message(trace: Any, data: bytes = b"\x01\x00") -> None:
    trace.message(sent=False, version=0x0303, content_type=0x16, data=data)


@pytest.mark.parametrize(
    ("target", "address", "is_followed"),
    [
        ("192.0.2.1", "192.0.2.1", True), ("192.0.2.1", "::ffff:192.0.2.1", True), ("192.0.2.1", "192.0.2.2", False),
        ("2001:DB8:0::1", "2001:db8::1", True), ("meter", "192.0.2.1", False),
    ],
)  # fmt: skip
def test_an_address_is_followed_from_the_first_byte(target: str, address: str, is_followed: bool) -> None:
    stage = Stage()
    stage.start(target)
    assert (stage.accepted(address) is not None) == is_followed
    assert stage.kinds == (["TraceConnected"] if is_followed else [])


def test_tls12_is_held_until_the_identity_is_known_then_shown_or_forgotten() -> None:
    stage = Stage()
    stage.start("meter")
    mine, other = stage.greeted(), stage.greeted()
    for trace in (mine, other):
        message(trace)
    assert stage.told == []
    other.identified(b"other")
    other.settled(Outcome.OK, "", 0.1)
    assert stage.told == []
    mine.identified(b"meter")
    mine.settled(Outcome.WRONG_KEY, "bad", 0.1)
    assert stage.kinds == ["TraceConnected", "TraceMessage", "TraceIdentity", "TraceOutcome"]
    assert not stage.tracers.pending


def test_tls13_is_known_by_its_hello() -> None:
    stage = Stage()
    stage.start("meter")
    assert stage.greeted(b"other", version=0x0304) is None
    assert stage.greeted(b"ticket", b"meter", version=0x0304) is not None


def test_what_is_held_for_others_is_bounded() -> None:
    stage = Stage()
    stage.start("meter")
    held = [stage.greeted() for _ in range(PENDING_MAX)]
    assert all(trace is not None for trace in held)
    assert stage.greeted() is None
    held[0].settled(Outcome.TIMEOUT, "", 10)
    assert stage.greeted() is not None
    stage.tracers.handle(StopTrace(0))
    assert not stage.tracers.pending


def test_a_flood_is_counted_and_comes_back_at_its_rate() -> None:
    stage = Stage()
    stage.start("192.0.2.1")
    assert sum(stage.accepted() is not None for _ in range(CONNECTIONS_BURST + 50)) == CONNECTIONS_BURST
    stage.now += 1
    assert sum(stage.accepted() is not None for _ in range(100)) == CONNECTIONS_PER_S
    stage.now += 1
    assert stage.accepted() is not None
    assert stage.left_out == 50 + 100 - CONNECTIONS_PER_S


def test_messages_of_a_connection_are_bounded_in_number_and_size() -> None:
    stage = Stage()
    stage.start("192.0.2.1")
    trace = stage.accepted()
    for _ in range(MESSAGES_MAX + 7):
        message(trace, bytes(10_000))
    trace.ended("the device closed")
    events = [event for told in stage.told if isinstance(told, TraceEvents) for event in told.events]
    shown = [event for event in events if isinstance(event, TraceMessage)]
    assert len(shown) == MESSAGES_MAX
    assert {(event.length, len(event.data)) for event in shown} == {(10_000, 4096)}
    assert stage.left_out == 7


def test_secrets_go_to_who_asked_for_them_about_this_device_in_time() -> None:
    stage = Stage()
    stage.start("meter", wants_keys=True)
    stage.tracers.handle(StartTrace("192.0.2.1", stage.now + 60, number=1))
    other, mine = stage.greeted(), stage.greeted()
    other.secret("CLIENT_RANDOM 00 11")
    other.identified(b"other")
    other.secret("CLIENT_RANDOM 00 11")
    assert not [told for told in stage.told if isinstance(told, KeyLogLine)]
    mine.identified(b"meter")
    mine.secret("CLIENT_RANDOM 22 33")
    stage.now += 61
    mine.secret("CLIENT_RANDOM 44 55")
    (line,) = [told for told in stage.told if isinstance(told, KeyLogLine)]
    assert (line.number, line.line) == (0, "CLIENT_RANDOM 22 33")
    assert "33" not in repr(line)
