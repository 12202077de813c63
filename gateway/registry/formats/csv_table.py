"""CSV with a line of column names, read and written one line at a time: no cell of ours has a line break."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gateway.errors import RegistryRefused
from gateway.registry.formats.source import BadLine, DeviceFile, Line

__all__ = ["Row", "parse_boolean", "read_rows", "write_row"]


class Row(NamedTuple):
    """The cells of a line by the names of their columns; columns that the file does not have are missing."""

    line: int
    cells: dict[str, str]


def read_rows(file: DeviceFile, columns: Sequence[str]) -> Iterator[Row | BadLine]:
    """The rows of a file that has some of these columns, the first of them in any case."""
    names: list[str] | None = None
    for line in file.lines():
        if isinstance(line, BadLine):
            yield line
            continue
        cells = _cells(line)
        if isinstance(cells, BadLine):
            yield cells
        elif names is None:
            names = [name.strip() for name in cells]
            if fault := _header_fault(names, columns):
                yield BadLine(line.number, fault)
                return
        elif len(cells) != len(names):
            yield BadLine(line.number, f"the line has {len(cells)} cells, and there are {len(names)} columns")
        else:
            yield Row(line.number, dict(zip(names, cells, strict=True)))


def write_row(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def parse_boolean(column: str, text: str, *, yes: str, no: str) -> bool:
    """Raises RegistryRefused."""
    if text not in {yes, no}:
        raise RegistryRefused(f"{column} is {yes} or {no}")
    return text == yes


def _cells(line: Line) -> list[str] | BadLine:
    try:
        (cells,) = csv.reader((line.text,), strict=True)
    except csv.Error:  # its text may quote the line
        return BadLine(line.number, "the line is no CSV: a quote is not closed, or stands where none may")
    return cells


def _header_fault(names: list[str], columns: Sequence[str]) -> str | None:
    if columns[0] not in names:
        return f"the first line names the columns, separated by commas: {columns[0]} is missing"
    unknown = sorted(set(names) - set(columns))
    if unknown:
        return f"column {unknown[0][:100]!a} is unknown: there are {', '.join(columns)}"
    if len(set(names)) < len(names):
        return "a column is named twice"
    return None
