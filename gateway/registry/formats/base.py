"""What every format of device files has in common: the values that it gives and takes.

What a format, or one line of a file, does not say is `UNCHANGED`: a new device gets the default, one that is there
already keeps what it has.
"""

import abc
import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar, Final, Literal, TypeVar, get_args

import msgspec
from msgspec.structs import replace

from gateway.errors import RegistryRefused
from gateway.registry.formats.keys import KeyEncoding
from gateway.registry.formats.source import BadLine, DeviceFile
from gateway.registry.realms import UNCHANGED, Unchanged
from gateway.registry.records import PskHash
from gateway.registry.sealing import Key

__all__ = [
    "ALL_FEATURES",
    "Feature",
    "FileCredential",
    "FileDevice",
    "Format",
    "Ignored",
    "Parsed",
    "joined",
    "or_bad_line",
    "said",
    "write_time",
]

T = TypeVar("T")

Feature = Literal["device", "group", "labels", "networks", "enabled", "hash", "window", "revoked"]
"""What a file may say beside identities and keys; `device` is a name apart from the identity."""

ALL_FEATURES: Final[frozenset[Feature]] = frozenset(get_args(Feature))


class FileCredential(msgspec.Struct, frozen=True):
    """An identity of a file with its key, checked; no key: it is derived, or is not to change."""

    identity: str
    key: Key | None = None
    hash: PskHash | Unchanged = UNCHANGED
    not_before: dt.datetime | Unchanged | None = UNCHANGED
    not_after: dt.datetime | Unchanged | None = UNCHANGED
    revoked_at: dt.datetime | Unchanged | None = UNCHANGED


class FileDevice(msgspec.Struct, frozen=True):
    """A device of a file, checked, from the lines `line` to `last_line`. Without a name it is called as its identity."""

    line: int
    last_line: int
    credentials: tuple[FileCredential, ...]
    name: str | None = None
    group: str | Unchanged | None = UNCHANGED
    labels: Mapping[str, str] | Unchanged = UNCHANGED
    networks: tuple[str, ...] | Unchanged = UNCHANGED
    disabled: bool | Unchanged = UNCHANGED


class Ignored(msgspec.Struct, frozen=True):
    """An entry that is none of ours, such as a certificate; nothing is wrong with it."""

    line: int
    reason: str


Parsed = FileDevice | BadLine | Ignored


class Format(abc.ABC):
    """One format; it has no state. Reading gives a `BadLine` for what it cannot take, and goes on."""

    name: ClassVar[str]
    key_encoding: ClassVar[KeyEncoding]
    """How its keys are written unless somebody says otherwise."""
    carries: ClassVar[frozenset[Feature]] = frozenset()
    needs_keys: ClassVar[bool] = False
    """Whether a file without keys would be no such file."""
    separator: ClassVar[str] = ""
    """Between two devices."""

    @abc.abstractmethod
    def read(self, file: DeviceFile, encoding: KeyEncoding) -> Iterator[Parsed]:
        """The devices of a file, in its order."""

    def begin(self, *, with_keys: bool) -> str:
        """What stands before the first device."""
        del with_keys
        return ""

    @abc.abstractmethod
    def write(self, device: FileDevice, encoding: KeyEncoding, *, with_keys: bool) -> str:
        """A device whose name and values are all said and whose identities are not `unfit`."""

    def end(self) -> str:
        """What stands after the last device."""
        return ""

    def unfit(self, identity: str) -> str | None:
        """Why an identity cannot be written, None when it can."""
        del identity
        return None


def said(value: T | Unchanged) -> T:
    """A value of a device that is written."""
    assert value is not UNCHANGED
    return value


def write_time(moment: dt.datetime | Unchanged | None) -> str | None:
    """RFC 3339 in UTC, to the microsecond when there are any; None for none."""
    moment = said(moment)
    return None if moment is None else moment.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")


def or_bad_line(line: int, parse: Callable[[], T]) -> T | BadLine:
    """What `parse` gives, or why the line is refused."""
    try:
        return parse()
    except RegistryRefused as exc:
        return BadLine(line, str(exc))


def joined(devices: Iterable[Parsed]) -> Iterator[Parsed]:
    """Entries of one credential each: those of one device that follow each other become one."""
    waiting: FileDevice | None = None
    for each in devices:
        if isinstance(each, Ignored):
            yield each
        elif waiting is None or isinstance(each, BadLine) or each.name is None or each.name != waiting.name:
            if waiting is not None:
                yield waiting
            waiting = each if isinstance(each, FileDevice) else None
            if waiting is None:
                yield each
        elif _said(each) != _said(waiting):
            yield waiting
            waiting = None
            yield BadLine(each.line, f"it says otherwise of device {each.name!r} than the line before")
        else:
            waiting = replace(
                waiting, last_line=each.last_line, credentials=waiting.credentials + each.credentials
            )
    if waiting is not None:
        yield waiting


def _said(device: FileDevice) -> tuple[object, ...]:
    return device.group, device.labels, device.networks, device.disabled
