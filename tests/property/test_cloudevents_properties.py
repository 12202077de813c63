"""Events are one line of JSON that holds the payload unharmed."""

import base64
import json
import math
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from hypothesis import example, given, settings, strategies as st

from gateway.wire.cloudevents import PayloadKind, check_payload, encode_event

patient = settings(deadline=None)  # a busy machine is not a failure; pytest's time-out bounds the test

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
times = st.floats(0, 4e9)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def decode(event: bytes) -> dict[str, Any]:
    assert b"\n" not in event
    assert b"\r" not in event
    decoded = json.loads(event)
    assert isinstance(decoded, dict)
    return decoded


def encode(payload: bytes, kind: PayloadKind) -> bytes:
    return encode_event(
        session="s",
        sequence=1,
        realm="r",
        device="d",
        received_at=0.0,
        content_type="x/y",
        kind=kind,
        payload=payload,
    )


@patient
@given(json_values, st.sampled_from([None, 1, "\t"]), st.booleans(), st.sampled_from(["\n", "\r\n", "\r"]))
def test_json_is_embedded(value: object, indent: int | str | None, ascii_only: bool, line_break: str) -> None:
    payload = json.dumps(value, indent=indent, ensure_ascii=ascii_only).replace("\n", line_break).encode()
    check_payload(payload, PayloadKind.JSON)
    assert decode(encode(payload, PayloadKind.JSON))["data"] == value


@patient
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_a_string(text: str) -> None:
    check_payload(text.encode(), PayloadKind.TEXT)
    assert decode(encode(text.encode(), PayloadKind.TEXT))["data"] == text


@patient
@given(st.binary())
def test_binary_is_base64(payload: bytes) -> None:
    check_payload(payload, PayloadKind.BINARY)
    assert (
        base64.b64decode(decode(encode(payload, PayloadKind.BINARY))["data_base64"], validate=True) == payload
    )


@patient
@given(
    st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")),
    st.sampled_from(PayloadKind),
)
@example(b"[" * 100_000, PayloadKind.JSON)
@example(b'"\\ud800"', PayloadKind.JSON)
@example(b'{"a":"\xff"}', PayloadKind.JSON)
@example(b"1" * 5000, PayloadKind.JSON)
def test_a_payload_passes_and_encodes_or_is_refused(payload: bytes, kind: PayloadKind) -> None:
    try:
        check_payload(payload, kind)
    except ValueError:
        return
    assert b"\n" not in encode(payload, kind)


@patient
@given(names, names, times, st.integers(1, 10**20 - 1))
def test_attributes(realm: str, device: str, received_at: float, sequence: int) -> None:
    event = decode(
        encode_event(
            session="0190a6e8-0000-7000-8000-000000000000",
            sequence=sequence,
            realm=realm,
            device=device,
            received_at=received_at,
            content_type="text/plain",
            kind=PayloadKind.TEXT,
            payload=b"",
        )
    )
    assert event["realm"] == realm
    assert event["device"] == device
    assert event["source"].isascii()
    assert [unquote(part) for part in event["source"].split("/")] == ["", "realms", realm, "devices", device]
    assert len(event["sequence"]) == 20
    assert int(event["sequence"]) == sequence
    assert event["id"] == f"0190a6e8-0000-7000-8000-000000000000-{event['sequence']}"
    assert event["time"].endswith("Z")
    time = datetime.fromisoformat(event["time"]).astimezone(UTC).timestamp()
    assert math.isclose(time, received_at, abs_tol=1e-6)
