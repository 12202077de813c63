"""The file that devices are read from: bounded lines of UTF-8, each with its number."""

import codecs
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple, Self

import msgspec

from gateway.errors import RegistryRefused

__all__ = ["LINE_BYTES_MAX", "BadLine", "DeviceFile", "Line"]

LINE_BYTES_MAX: Final = 65_536
"""A device with all the labels and networks that it may have takes less."""

_BLOCK_BYTES: Final = 1 << 18
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Line(NamedTuple):
    """A line without its end, and its number from 1."""

    number: int
    text: str


class BadLine(msgspec.Struct, frozen=True):
    """A line that cannot be taken, and why; never with a key."""

    line: int
    reason: str


class DeviceFile:
    """A file that is read from its start, as often as needed, and must stay what it is meanwhile.

    Raises RegistryRefused, from everything here: it cannot be read, is no regular file, changed, or is not text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as exc:
            raise RegistryRefused(f"{path} cannot be read: {exc.strerror}") from exc
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise RegistryRefused(f"{path} is no regular file: write what is to be imported into one")
        self.size = status.st_size
        self._status = _changing(status)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> int:
        """How many bytes were read."""
        return self._file.tell()

    def check_unchanged(self) -> None:
        """Refuse a file that is being written to."""
        if _changing(os.fstat(self._file.fileno())) != self._status:
            raise RegistryRefused(
                f"{self.path} was changed while it was read: import a file that stays as it is"
            )

    def blocks(self) -> Iterator[bytes]:
        """The whole file, piece by piece."""
        self._file.seek(0)
        while block := self._file.read(_BLOCK_BYTES):
            yield block
        self.check_unchanged()

    def text(self) -> Iterator[str]:
        """The whole file decoded, piece by piece, for a format whose entries are not lines."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line = 1
        for block in self.blocks():
            self._check_text(block, line)
            try:
                yield decoder.decode(block)
            except UnicodeDecodeError as exc:
                line += block.count(b"\n", 0, exc.start)
                raise RegistryRefused(f"{self.path} is not UTF-8, see line {line}: save it as UTF-8") from exc
            line += block.count(b"\n")
        if decoder.getstate()[0]:
            raise RegistryRefused(f"{self.path} ends within a character: it is not UTF-8, or was cut off")

    def lines(self) -> Iterator[Line | BadLine]:
        """The lines that are not blank; those that are too long or not UTF-8 as bad ones."""
        self._file.seek(0)
        number = 0
        while raw := self._file.readline(LINE_BYTES_MAX + 1):
            number += 1
            self._check_text(raw, number)
            if len(raw) > LINE_BYTES_MAX and not raw.endswith(b"\n"):
                self._skip_line(number)
                yield BadLine(number, f"the line is longer than {LINE_BYTES_MAX} bytes")
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield BadLine(number, "the line is not UTF-8")
                continue
            if text and not text.isspace():
                yield Line(number, text)
        self.check_unchanged()

    def _skip_line(self, number: int) -> None:
        while raw := self._file.readline(LINE_BYTES_MAX):
            self._check_text(raw, number)
            if raw.endswith(b"\n"):
                return

    def _check_text(self, raw: bytes, number: int) -> None:
        if number == 1 and raw.startswith(_UTF16):
            raise RegistryRefused(f"{self.path} is UTF-16: save it as UTF-8")
        if (place := raw.find(b"\0")) >= 0:
            number += raw.count(b"\n", 0, place)
            raise RegistryRefused(f"{self.path} is no text but a binary file, see line {number}")


def _changing(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
