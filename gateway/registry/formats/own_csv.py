"""Our own CSV: one credential a line; a device with several has its lines one after the other. Says everything."""

import datetime as dt
from collections.abc import Iterator
from functools import partial

import msgspec

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.formats.base import (
    ALL_FEATURES,
    FileCredential,
    FileDevice,
    Format,
    Parsed,
    joined,
    or_bad_line,
    said,
    write_time,
)
from gateway.registry.formats.csv_table import Row, parse_boolean, read_rows, write_row
from gateway.registry.formats.keys import KeyEncoding, decode_key, encode_key
from gateway.registry.formats.source import BadLine, DeviceFile
from gateway.registry.realms import UNCHANGED, Unchanged
from gateway.registry.records import PskHash

__all__ = ["OwnCsv"]

_COLUMNS = (
    "identity",
    "key",
    "device",
    "group",
    "labels",
    "allow_from",
    "enabled",
    "hash",
    "not_before",
    "not_after",
    "revoked_at",
)


class OwnCsv(Format):
    """Columns in any order; only `identity` has to be there."""

    name = "csv"
    key_encoding = "hex"
    carries = ALL_FEATURES

    def read(self, file: DeviceFile, encoding: KeyEncoding) -> Iterator[Parsed]:
        return joined(
            row if isinstance(row, BadLine) else or_bad_line(row.line, partial(_device, row, encoding))
            for row in read_rows(file, _COLUMNS)
        )

    def begin(self, *, with_keys: bool) -> str:
        return write_row(column for column in _COLUMNS if with_keys or column != "key")

    def write(self, device: FileDevice, encoding: KeyEncoding, *, with_keys: bool) -> str:
        return "".join(
            write_row(_cells(device, credential, encoding, with_keys=with_keys))
            for credential in device.credentials
        )


def _device(row: Row, encoding: KeyEncoding) -> FileDevice:
    cells = row.cells
    key = cells.get("key")
    credential = FileCredential(
        identity=identities.parse_identity(cells["identity"]),
        key=decode_key(key, encoding) if key else None,
        hash=_hash(cells.get("hash")),
        not_before=_time(cells.get("not_before")),
        not_after=_time(cells.get("not_after")),
        revoked_at=_time(cells.get("revoked_at")),
    )
    name, group = cells.get("device"), cells.get("group")
    labels, networks, enabled = cells.get("labels"), cells.get("allow_from"), cells.get("enabled")
    return FileDevice(
        row.line,
        row.line,
        (credential,),
        name=identities.parse_device_name(name) if name else None,
        group=UNCHANGED if group is None else identities.parse_group(group) if group else None,
        labels=UNCHANGED if labels is None else _labels(labels),
        networks=UNCHANGED if networks is None else identities.parse_networks(networks.split()),
        disabled=not parse_boolean("enabled", enabled, yes="yes", no="no") if enabled else UNCHANGED,
    )


def _cells(
    device: FileDevice, credential: FileCredential, encoding: KeyEncoding, *, with_keys: bool
) -> Iterator[str]:
    yield credential.identity
    if with_keys:
        yield "" if credential.key is None else encode_key(credential.key, encoding)
    yield device.name or ""
    yield said(device.group) or ""
    labels = said(device.labels)
    yield msgspec.json.encode(labels).decode() if labels else ""
    yield " ".join(said(device.networks))
    yield "no" if said(device.disabled) else "yes"
    yield said(credential.hash)
    for moment in (credential.not_before, credential.not_after, credential.revoked_at):
        yield write_time(moment) or ""


def _hash(text: str | None) -> PskHash | Unchanged:
    return identities.parse_hash(text) if text else UNCHANGED


def _time(text: str | None) -> dt.datetime | Unchanged | None:
    if text is None:
        return UNCHANGED
    return identities.parse_time(text) if text else None


def _labels(text: str) -> dict[str, str]:
    if not text:
        return {}
    try:
        return identities.parse_labels(msgspec.json.decode(text, type=dict[str, str]))
    except msgspec.MsgspecError as exc:
        raise RegistryRefused('labels are a JSON object of texts, such as {"site":"north"}') from exc
