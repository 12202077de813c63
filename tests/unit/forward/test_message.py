import json
import uuid

from gateway.forward.message import UUID7_RANDOM_BITS, Message, encode_message, uuid7
from gateway.wire.cloudevents import PayloadKind

MESSAGE = Message(
    realm="default",
    device="meter/1",
    identity="meter-1-2025",
    group="meters",
    session="0190a6e8-b5a0-7000-8000-0123456789ab",
    sequence=3,
    received_at=1764000000.0,
    payload=b"21.5",
)


def test_event_has_the_attributes_of_the_message() -> None:
    event = json.loads(encode_message(MESSAGE, "text/plain", PayloadKind.TEXT))
    assert event["id"] == MESSAGE.event_id == "0190a6e8-b5a0-7000-8000-0123456789ab-00000000000000000003"
    assert event["source"] == MESSAGE.source == "/realms/default/devices/meter%2F1"
    assert (event["realm"], event["device"], event["data"]) == ("default", "meter/1", "21.5")
    assert event["time"] == "2025-11-24T16:00:00Z"


def test_identity_stays_inside() -> None:
    assert b"meter-1-2025" not in encode_message(MESSAGE, "text/plain", PayloadKind.TEXT)


class TestUuid7:
    def test_layout(self) -> None:
        made = uuid.UUID(uuid7(1645557742.0, 0))
        assert made.version == 7
        assert made.variant == uuid.RFC_4122
        assert made.int >> 80 == 1645557742000
        assert str(made) == "017f22e2-79b0-7000-8000-000000000000"

    def test_random_bits(self) -> None:
        assert uuid7(0.0, (1 << UUID7_RANDOM_BITS) - 1) == "00000000-0000-7000-bfff-ffffffffffff"

    def test_sorts_within_a_millisecond(self) -> None:
        made = [uuid7(1764000000 + step * 0.000_25, (255 - step) << 54) for step in range(16)]
        assert made == sorted(made)
        assert len(set(made)) == 16
