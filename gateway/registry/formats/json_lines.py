"""JSON Lines: one device a line, with all its credentials. Says everything.

{"device": "meter-1", "group": "meters", "labels": {}, "allow_from": [], "enabled": true,
 "credentials": [{"identity": "meter-1", "key": "..", "hash": "sha256", "not_before": null, ...}]}
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.formats.base import (
    ALL_FEATURES,
    FileCredential,
    FileDevice,
    Format,
    Parsed,
    or_bad_line,
    said,
    write_time,
)
from gateway.registry.formats.keys import KeyEncoding, decode_key, encode_key
from gateway.registry.formats.source import BadLine, DeviceFile, Line
from gateway.registry.realms import UNCHANGED
from gateway.registry.records import PskHash

__all__ = ["JsonLines"]


class _Credential(msgspec.Struct, forbid_unknown_fields=True):
    identity: str
    key: str | None = None
    hash: PskHash | UnsetType = UNSET
    not_before: str | UnsetType | None = UNSET
    not_after: str | UnsetType | None = UNSET
    revoked_at: str | UnsetType | None = UNSET


class _Device(msgspec.Struct, forbid_unknown_fields=True):
    credentials: list[_Credential]
    device: str | None = None
    group: str | UnsetType | None = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    allow_from: list[str] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


_decode = msgspec.json.Decoder(_Device).decode


class JsonLines(Format):
    """Only `credentials` has to be there, and `identity` in each."""

    name = "jsonl"
    key_encoding = "hex"
    carries = ALL_FEATURES

    def read(self, file: DeviceFile, encoding: KeyEncoding) -> Iterator[Parsed]:
        for line in file.lines():
            if isinstance(line, BadLine):
                yield line
            else:
                yield or_bad_line(line.number, partial(_device, line, encoding))

    def write(self, device: FileDevice, encoding: KeyEncoding, *, with_keys: bool) -> str:
        document = {
            "device": device.name,
            "group": said(device.group),
            "labels": said(device.labels),
            "allow_from": said(device.networks),
            "enabled": not said(device.disabled),
            "credentials": [
                _written(credential, encoding, with_keys=with_keys) for credential in device.credentials
            ],
        }
        return msgspec.json.encode(document).decode() + "\n"


def _device(line: Line, encoding: KeyEncoding) -> FileDevice:
    try:
        found = _decode(line.text)
    except msgspec.ValidationError as exc:  # it names the place and the type, never the value
        raise RegistryRefused(f"the line is not a device: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise RegistryRefused("the line is no JSON") from exc
    if not found.credentials:
        raise RegistryRefused("the device has no credential")
    return FileDevice(
        line.number,
        line.number,
        tuple(_credential(each, encoding) for each in found.credentials),
        name=None if found.device is None else identities.parse_device_name(found.device),
        group=UNCHANGED
        if found.group is UNSET
        else None
        if found.group is None
        else identities.parse_group(found.group),
        labels=UNCHANGED if found.labels is UNSET else identities.parse_labels(found.labels),
        networks=UNCHANGED if found.allow_from is UNSET else identities.parse_networks(found.allow_from),
        disabled=UNCHANGED if found.enabled is UNSET else not found.enabled,
    )


def _credential(found: _Credential, encoding: KeyEncoding) -> FileCredential:
    windows = {
        name: UNCHANGED if text is UNSET else None if text is None else identities.parse_time(text)
        for name in ("not_before", "not_after", "revoked_at")
        for text in (getattr(found, name),)
    }
    return FileCredential(
        identity=identities.parse_identity(found.identity),
        key=None if found.key is None else decode_key(found.key, encoding),
        hash=UNCHANGED if found.hash is UNSET else found.hash,
        **windows,
    )


def _written(credential: FileCredential, encoding: KeyEncoding, *, with_keys: bool) -> dict[str, Any]:
    document: dict[str, Any] = {"identity": credential.identity}
    if with_keys and credential.key is not None:
        document["key"] = encode_key(credential.key, encoding)
    return document | {
        "hash": said(credential.hash),
        "not_before": write_time(credential.not_before),
        "not_after": write_time(credential.not_after),
        "revoked_at": write_time(credential.revoked_at),
    }
