import json

import pytest

from gateway.wire.cloudevents import (
    EVENT_START,
    PayloadKind,
    check_payload,
    encode_event,
    event_source,
    payload_kind,
)


def encode(payload: bytes, content_type: str) -> bytes:
    return encode_event(
        session="0190a6e8-b5a0-7000-8000-0123456789ab",
        sequence=7,
        realm="default",
        device="meter 1/a",
        received_at=1764000000.25,
        content_type=content_type,
        kind=payload_kind(content_type),
        payload=payload,
    )


def test_the_whole_event_as_it_stands_in_the_file() -> None:
    assert encode(b'{"t": 21.50}', "application/json") == (
        b'{"specversion":"1.0",'
        b'"id":"0190a6e8-b5a0-7000-8000-0123456789ab-00000000000000000007",'
        b'"source":"/realms/default/devices/meter%201%2Fa",'
        b'"type":"device.payload",'
        b'"time":"2025-11-24T16:00:00.250000Z",'
        b'"datacontenttype":"application/json",'
        b'"realm":"default","device":"meter 1/a","sequence":"00000000000000000007",'
        b'"data":{"t": 21.50}}'
    )


def test_event_start() -> None:
    assert encode(b"x", "text/plain").startswith(EVENT_START)


def test_text_and_binary() -> None:
    text = json.loads(encode("21 °C\t\x00".encode(), "text/plain"))
    assert text["data"] == "21 °C\t\x00"
    assert "data_base64" not in text
    binary = json.loads(encode(b"\x00\xff", "application/octet-stream"))
    assert binary["data_base64"] == "AP8="
    assert "data" not in binary


def test_json_null_is_data() -> None:
    assert json.loads(encode(b"null", "application/json"))["data"] is None


def test_numbers_keep_their_digits() -> None:
    assert b'"data":[1.10, 100000000000000000000000, 1e999]}' in encode(
        b"[1.10, 100000000000000000000000, 1e999]", "application/json"
    )


def test_line_breaks_between_json_tokens_become_spaces() -> None:
    event = encode(b'{\r\n "a":\n "x\\ny"}', "application/json")
    assert event.endswith(b'"data":{   "a":  "x\\ny"}}')


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        ("application/json", PayloadKind.JSON),
        ("Application/JSON; charset=utf-8", PayloadKind.JSON),
        ("application/senml+json", PayloadKind.JSON),
        ("text/plain", PayloadKind.TEXT),
        ("TEXT/csv;header=present", PayloadKind.TEXT),
        ("application/octet-stream", PayloadKind.BINARY),
        ("application/json-seq", PayloadKind.BINARY),
        ("application/cbor", PayloadKind.BINARY),
        ("", PayloadKind.BINARY),
    ],
)
def test_payload_kind(content_type: str, kind: PayloadKind) -> None:
    assert payload_kind(content_type) is kind


@pytest.mark.parametrize(
    "payload", [b"{}", b" [1, 2]\n", b'"\xc3\xa9"', b"0", b"null", b"1e999", b'{"a":1,"a":2}']
)
def test_json_accepted(payload: bytes) -> None:
    check_payload(payload, PayloadKind.JSON)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"{",
        b"[1,]",
        b"{} {}",
        b"NaN",
        b"Infinity",
        b"01",
        b"'a'",
        b'"\xff"',
        b'{"\xff":1}',
        b'"\t"',
        b'"a\nb"',
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_json_refused(payload: bytes) -> None:
    with pytest.raises(ValueError):
        check_payload(payload, PayloadKind.JSON)


def test_text_must_be_utf8() -> None:
    check_payload("é".encode(), PayloadKind.TEXT)
    with pytest.raises(ValueError):
        check_payload(b"\xe9", PayloadKind.TEXT)
    check_payload(b"\xe9", PayloadKind.BINARY)


@pytest.mark.parametrize(
    ("device", "segment"),
    [
        ("a-b.c_d~1", "a-b.c_d~1"),
        ("a/b", "a%2Fb"),
        ("é", "%C3%A9"),
        ("a b?#%", "a%20b%3F%23%25"),
        ("\n", "%0A"),
    ],
)
def test_source_is_one_segment_per_name(device: str, segment: str) -> None:
    assert event_source("r", device) == f"/realms/r/devices/{segment}"
    assert event_source(device, "d") == f"/realms/{segment}/devices/d"
