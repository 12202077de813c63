"""Eclipse Hono's credentials of type `psk`: a JSON array of them, or one after the other without one.

    [{"device-id": "meter-1", "type": "psk", "auth-id": "meter-1", "enabled": true,
      "secrets": [{"not-before": "2030-01-01T00:00:00Z", "not-after": "2031-01-01T00:00:00Z", "key": "<base64>"}]}]

The auth-id is the identity, the device-id the device's name; entries of one device follow each other. A handshake can
verify one key only, so one secret has to be left of those that are enabled and not over; it is refused to choose among
several. Entries of one device that are all disabled disable the device; when only some are, these count as revoked.
"""

import datetime as dt
import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.formats.base import (
    FileCredential,
    FileDevice,
    Format,
    Ignored,
    Parsed,
    joined,
    or_bad_line,
    said,
    write_time,
)
from gateway.registry.formats.keys import KeyEncoding, decode_key, encode_key
from gateway.registry.formats.source import LINE_BYTES_MAX, BadLine, DeviceFile
from gateway.registry.realms import UNCHANGED

__all__ = ["Hono"]

_SPACE: Final = " \t\r\n"


class _Secret(msgspec.Struct, rename="kebab"):
    key: str | None = None
    enabled: bool = True
    not_before: str | None = None
    not_after: str | None = None


class _Entry(msgspec.Struct, rename="kebab"):
    type: str
    auth_id: str
    device_id: str | None = None
    enabled: bool = True
    secrets: list[_Secret] = []


class Hono(Format):
    """Secrets without a key are those of a realm that derives its keys."""

    name = "hono"
    key_encoding = "base64"
    carries = frozenset({"device", "enabled", "window", "revoked"})
    separator = ",\n"

    def read(self, file: DeviceFile, encoding: KeyEncoding) -> Iterator[Parsed]:
        now = dt.datetime.now(dt.UTC)
        entries = (
            each
            if isinstance(each, BadLine)
            else or_bad_line(each.line, partial(_device, each, encoding, now))
            for each in _objects(file.text())
        )
        return map(_settled, joined(entries))

    def begin(self, *, with_keys: bool) -> str:
        del with_keys
        return "[\n"

    def write(self, device: FileDevice, encoding: KeyEncoding, *, with_keys: bool) -> str:
        return self.separator.join(
            json.dumps(_written(device, credential, encoding, with_keys=with_keys), ensure_ascii=False)
            for credential in device.credentials
        )

    def end(self) -> str:
        return "\n]\n"


def _device(found: "_Object", encoding: KeyEncoding, now: dt.datetime) -> FileDevice | Ignored:
    """A device of one credential, which says that it is disabled by being revoked."""
    try:
        entry = msgspec.convert(found.value, _Entry)
    except msgspec.ValidationError as exc:  # it names the place and the type, never the value
        raise RegistryRefused(f"the entry is no credential of Hono: {exc}") from exc
    if entry.type != "psk":
        return Ignored(found.line, f"a credential of type {entry.type[:32]!a}")
    secret = _secret(entry.secrets, now)
    credential = FileCredential(
        identity=identities.parse_identity(entry.auth_id),
        key=None if secret.key is None else decode_key(secret.key, encoding),
        not_before=None if secret.not_before is None else identities.parse_time(secret.not_before),
        not_after=None if secret.not_after is None else identities.parse_time(secret.not_after),
        revoked_at=None if entry.enabled else now,
    )
    name = None if entry.device_id is None else identities.parse_device_name(entry.device_id)
    return FileDevice(found.line, found.line, (credential,), name=name)


def _secret(secrets: list[_Secret], now: dt.datetime) -> _Secret:
    enabled = [secret for secret in secrets if secret.enabled]
    if len(enabled) > 1:
        enabled = [
            secret
            for secret in enabled
            if secret.not_after is None or identities.parse_time(secret.not_after) > now
        ]
    if len(enabled) != 1:
        raise RegistryRefused(
            f"{len(enabled) or 'none'} of its secrets are enabled and not over: an identity has one key here"
        )
    return enabled[0]


def _settled(parsed: Parsed) -> Parsed:
    """Whether the device is disabled, or some of its credentials are revoked."""
    if not isinstance(parsed, FileDevice):
        return parsed
    if any(credential.revoked_at is None for credential in parsed.credentials):
        return replace(parsed, disabled=False)
    return replace(
        parsed,
        disabled=True,
        credentials=tuple(replace(each, revoked_at=UNCHANGED) for each in parsed.credentials),
    )


def _written(
    device: FileDevice, credential: FileCredential, encoding: KeyEncoding, *, with_keys: bool
) -> dict[str, Any]:
    secret: dict[str, Any] = {}
    for name, moment in (("not-before", credential.not_before), ("not-after", credential.not_after)):
        if (text := write_time(moment)) is not None:
            secret[name] = text
    if with_keys and credential.key is not None:
        secret["key"] = encode_key(credential.key, encoding)
    return {
        "device-id": device.name,
        "type": "psk",
        "auth-id": credential.identity,
        "enabled": not said(device.disabled) and said(credential.revoked_at) is None,
        "secrets": [secret],
    }


class _Object(NamedTuple):
    """A JSON object of the file, and the line where it begins."""

    line: int
    value: dict[str, Any]


def _objects(blocks: Iterator[str]) -> Iterator[_Object | BadLine]:
    """The objects of an array, or of a sequence, of which each is as short as a line has to be."""
    reader = _ObjectReader()
    for block in blocks:
        yield from reader.feed(block)
        if reader.is_broken:
            return
    yield from reader.finish()


class _ObjectReader:
    """Goes on with every block; the text that is left in `_rest` begins at `_line`."""

    def __init__(self) -> None:
        self._decode = json.JSONDecoder().raw_decode
        self._rest = ""
        self._line = 1
        self._in_array = self._after_array = False
        self.is_broken = False

    def feed(self, block: str) -> Iterator[_Object | BadLine]:
        text, place = self._rest + block, 0
        while (start := self._skip(text, place)) < len(text) and not self.is_broken:
            place = start
            if text[place] != "{" or self._after_array:
                yield self._broken("it is no array of JSON objects")
                return
            try:
                value, end = self._decode(text, place)
            except (json.JSONDecodeError, RecursionError):
                if len(text) - place > LINE_BYTES_MAX:
                    yield self._broken(f"the entry is no JSON, or longer than {LINE_BYTES_MAX} characters")
                break  # the rest of it is in the next block
            yield _Object(self._line, value)
            self._line += text.count("\n", place, end)
            place = end
        else:
            place = start
        self._rest = text[place:]

    def finish(self) -> Iterator[BadLine]:
        """At the end of the file."""
        if self._rest:
            yield self._broken("the entry is no JSON, or the file was cut off")
        elif self._in_array:
            yield self._broken("the array is not closed: the file was cut off")

    def _skip(self, text: str, place: int) -> int:
        """Over what stands between objects."""
        while place < len(text):
            character = text[place]
            if character == "[" and not self._in_array and not self._after_array:
                self._in_array = True
            elif character == "]" and self._in_array:
                self._in_array, self._after_array = False, True
            elif character not in _SPACE and not (character == "," and self._in_array):
                break
            self._line += character == "\n"
            place += 1
        return place

    def _broken(self, reason: str) -> BadLine:
        self.is_broken = True
        self._rest = ""
        return BadLine(self._line, f"{reason}: nothing was read from here on")
