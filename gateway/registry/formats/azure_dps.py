"""Individual enrolments of Azure's Device Provisioning Service, as CSV with the names that its API gives the values.

    registrationId,deviceId,primaryKey,provisioningStatus

The registration id is the identity, the device id the device's name (empty: the same), the primary key base64 (empty where
it is derived), the status `enabled` or `disabled`. A column `secondaryKey` is let go: an identity has one key here.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Final

from gateway.registry import identities
from gateway.registry.formats.base import (
    FileCredential,
    FileDevice,
    Format,
    Parsed,
    joined,
    or_bad_line,
    said,
)
from gateway.registry.formats.csv_table import Row, parse_boolean, read_rows, write_row
from gateway.registry.formats.keys import KeyEncoding, decode_key, encode_key
from gateway.registry.formats.source import BadLine, DeviceFile
from gateway.registry.realms import UNCHANGED

__all__ = ["AzureDps"]

_COLUMNS: Final = ("registrationId", "deviceId", "primaryKey", "secondaryKey", "provisioningStatus")
_REGISTRATION_ID: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")


class AzureDps(Format):
    """Azure takes letters, digits and `. _ : -` in ids, none of the latter at an end, and knows no upper case."""

    name = "azure-dps"
    key_encoding = "base64"
    carries = frozenset({"device", "enabled"})

    def read(self, file: DeviceFile, encoding: KeyEncoding) -> Iterator[Parsed]:
        return joined(
            row if isinstance(row, BadLine) else or_bad_line(row.line, partial(_device, row, encoding))
            for row in read_rows(file, _COLUMNS)
        )

    def begin(self, *, with_keys: bool) -> str:
        return write_row(
            column
            for column in _COLUMNS
            if column != "secondaryKey" and (with_keys or column != "primaryKey")
        )

    def write(self, device: FileDevice, encoding: KeyEncoding, *, with_keys: bool) -> str:
        status = "disabled" if said(device.disabled) else "enabled"
        rows = []
        for credential in device.credentials:
            key = [] if credential.key is None else [encode_key(credential.key, encoding)]
            rows.append(
                write_row([credential.identity, device.name or "", *(key if with_keys else []), status])
            )
        return "".join(rows)

    def unfit(self, identity: str) -> str | None:
        return None if _REGISTRATION_ID.fullmatch(identity) else "an identity that is no registration id"


def _device(row: Row, encoding: KeyEncoding) -> FileDevice:
    cells = row.cells
    name, key, status = (cells.get(column) for column in ("deviceId", "primaryKey", "provisioningStatus"))
    credential = FileCredential(
        identities.parse_identity(cells["registrationId"]), decode_key(key, encoding) if key else None
    )
    return FileDevice(
        row.line,
        row.line,
        (credential,),
        name=identities.parse_device_name(name) if name else None,
        disabled=UNCHANGED
        if not status
        else not parse_boolean("provisioningStatus", status, yes="enabled", no="disabled"),
    )
