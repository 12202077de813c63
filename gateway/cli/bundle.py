"""A device bundle: what a device needs to connect, as JSON, as a C header, and as CSV for ESP-IDF's NVS."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway.errors import ConfigurationError
from gateway.registry.records import PskHash
from gateway.registry.sealing import Key
from gateway.wire.suites import suite_code

__all__ = ["Access", "c_header", "c_text", "check_folder", "write_bundle"]

_PRINTABLE: Final = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\?')
_CODES_PER_LINE: Final = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who a device is and where it connects. `suites` are OpenSSL's names of what the gateway takes, best first."""

    realm: str
    device: str
    identity: str
    key: Key
    host: str
    port: int
    server_name: str | None
    """To be sent in SNI, when that is how its realm is found."""
    hint: str | None
    hash: PskHash
    suites: tuple[str, ...]


def check_folder(folder: Path) -> None:
    """Make the folder of a bundle, and see that its files can be made.

    Raises:
        ConfigurationError: one of the files is there already, or the folder cannot be written.

    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"bundle {folder} cannot be made: {exc.strerror}") from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"bundle {folder} cannot be written: no permission")
    for name in _FORMATS:
        if (folder / name).exists():
            raise ConfigurationError(f"{folder / name} is there already: name another folder")


def write_bundle(folder: Path, access: Access) -> list[Path]:
    """Write one file per format, 0600; the files. Raises ConfigurationError."""
    return [_write(folder / name, encode(access)) for name, encode in _FORMATS.items()]


def _write(path: Path, text: str) -> Path:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be written: {exc.strerror}") from exc
    return path


def c_header(access: Access) -> str:
    """The device as macros. Key and suites are lists for an array's initialiser."""
    key = _wrapped([f"0x{byte:02x}" for byte in access.key.reveal()])
    suites = _wrapped([f"0x{suite_code(name):04X}" for name in access.suites])
    optional = "".join(
        f'#define PSKGW_{name} "{c_text(value)}"\n'
        for name, value in (("SERVER_NAME", access.server_name), ("HINT", access.hint))
        if value
    )
    return f"""\
/* Who the device is and where it connects. It holds the key: keep it out of version control. */
#pragma once

#define PSKGW_HOST "{c_text(access.host)}"
#define PSKGW_PORT {access.port}
#define PSKGW_IDENTITY "{c_text(access.identity)}"
{optional}\
#define PSKGW_KEY {key}
#define PSKGW_KEY_BYTES {len(access.key)}
/* What the gateway takes, best first, by IANA's numbers. */
#define PSKGW_SUITES {suites}
"""


def c_text(text: str) -> str:
    """The inside of a C string literal."""
    return "".join(chr(byte) if byte in _PRINTABLE else f"\\{byte:03o}" for byte in text.encode())


def _wrapped(values: list[str]) -> str:
    lines = [
        ", ".join(values[start : start + _CODES_PER_LINE]) for start in range(0, len(values), _CODES_PER_LINE)
    ]
    return lines[0] if len(lines) == 1 else "\\\n    " + ", \\\n    ".join(lines)


def _json(access: Access) -> str:
    document = {field.name: getattr(access, field.name) for field in dataclasses.fields(access)}
    return json.dumps(document | {"key": access.key.hex()}, indent=2, ensure_ascii=False) + "\n"


def _nvs_csv(access: Access) -> str:
    """For ESP-IDF's nvs_partition_gen.py: the namespace `pskgw`."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("key", "type", "encoding", "value"))
    rows.writerow(("pskgw", "namespace", "", ""))
    rows.writerow(("host", "data", "string", access.host))
    rows.writerow(("port", "data", "u16", access.port))
    rows.writerow(("identity", "data", "string", access.identity))
    rows.writerow(("key", "data", "hex2bin", access.key.hex()))
    for name, value in (("server_name", access.server_name), ("hint", access.hint)):
        if value:
            rows.writerow((name, "data", "string", value))
    rows.writerow(("suites", "data", "string", ":".join(access.suites)))
    return text.getvalue()


_FORMATS: Final[dict[str, Callable[[Access], str]]] = {
    "device.json": _json,
    "device.h": c_header,
    "device.csv": _nvs_csv,
}
