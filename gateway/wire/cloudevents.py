"""Messages as CloudEvents 1.0 in structured JSON, one event per line."""

import enum
import re
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

import msgspec

__all__ = [
    "EVENT_START",
    "EVENT_TYPE",
    "PayloadKind",
    "check_payload",
    "encode_event",
    "event_id",
    "event_source",
    "payload_kind",
]

EVENT_TYPE: Final = "device.payload"
EVENT_START: Final = b'{"specversion":"1.0",'
"""How every encoded event begins."""


class PayloadKind(enum.Enum):
    """How a payload stands in an event: as a JSON value, as a string, or as base64."""

    JSON = "json"
    TEXT = "text"
    BINARY = "binary"


def payload_kind(content_type: str) -> PayloadKind:
    """The kind that a media type asks for; its parameters and the case of its letters do not matter."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json" or media_type.endswith("+json"):
        return PayloadKind.JSON
    if media_type.startswith("text/"):
        return PayloadKind.TEXT
    return PayloadKind.BINARY


def check_payload(payload: bytes, kind: PayloadKind) -> None:
    """Raise ValueError when a payload is not what its kind says.

    JSON is one RFC 8259 value in UTF-8 without a byte order mark (no NaN, no lone surrogates, nesting up to what the
    interpreter's recursion limit allows), text is UTF-8, binary is anything.
    """
    if kind is PayloadKind.BINARY:
        return
    if not payload.isascii():
        payload.decode()
    if kind is PayloadKind.JSON:
        try:
            _json_syntax.decode(payload)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise ValueError(f"not JSON: {exc}") from exc


def encode_event(
    *,
    session: str,
    sequence: int,
    realm: str,
    device: str,
    received_at: float,
    content_type: str,
    kind: PayloadKind,
    payload: bytes,
    message_id: str | None = None,
) -> bytes:
    """One event without line breaks; `received_at` is Unix seconds, `payload` has passed `check_payload`.

    `message_id`, where the device gave one, is the `id` in place of session and sequence.

    A JSON payload is embedded as it came. A raw line break in it can only be white space between tokens (within a
    string it would be escaped), so it becomes a space.
    """
    data: msgspec.Raw | str | msgspec.UnsetType = msgspec.UNSET
    data_base64: bytes | msgspec.UnsetType = msgspec.UNSET
    if kind is PayloadKind.BINARY:
        data_base64 = payload
    elif kind is PayloadKind.TEXT:
        data = payload.decode()
    else:
        data = msgspec.Raw(payload.translate(_LINE_BREAKS_TO_SPACES))
    return _encode(
        _Event(
            specversion="1.0",
            id=event_id(session, sequence) if message_id is None else message_id,
            source=event_source(realm, device),
            type=EVENT_TYPE,
            time=datetime.fromtimestamp(received_at, UTC),
            datacontenttype=content_type,
            realm=realm,
            device=device,
            sequence=f"{sequence:020d}",
            data=data,
            data_base64=data_base64,
        )
    )


def event_id(session: str, sequence: int) -> str:
    """What a consumer drops duplicates by; it sorts in the order of the session."""
    return f"{session}-{sequence:020d}"


def event_source(realm: str, device: str) -> str:
    """A URI reference: each name is one path segment, percent-encoded."""
    if not _unreserved(realm):
        realm = quote(realm, safe="")
    if not _unreserved(device):
        device = quote(device, safe="")
    return f"/realms/{realm}/devices/{device}"


class _Event(msgspec.Struct, frozen=True, gc=False):
    """The order of the fields is the order in the JSON object."""

    specversion: str
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: str
    realm: str
    device: str
    sequence: str
    data: msgspec.Raw | str | msgspec.UnsetType
    data_base64: bytes | msgspec.UnsetType


_encode = msgspec.json.Encoder().encode
_json_syntax = msgspec.json.Decoder(msgspec.Raw)  # checks the syntax and builds nothing
_unreserved = re.compile(r"[A-Za-z0-9._~-]+").fullmatch  # RFC 3986 section 2.3
_LINE_BREAKS_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")
