"""What commands print: tables and fields for people, JSON documents for scripts, remarks on stderr."""

import datetime as dt
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["print_fields", "print_json", "print_json_array", "print_table", "remark", "rfc3339", "warn"]

WIDTH_MAX = 1_000_000
"""Of a table that nobody looks at: every row on one line, whatever its length."""


def rfc3339(when: dt.datetime | float | None) -> str | None:
    """A time (aware, or as Unix seconds) as RFC 3339 in UTC."""
    if when is None:
        return None
    if not isinstance(when, dt.datetime):
        when = dt.datetime.fromtimestamp(when, dt.UTC)
    return when.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")


def print_json(document: Any) -> None:
    """One document on stdout."""
    print(json.dumps(document, indent=2))


def print_json_array(documents: Iterable[Any]) -> None:
    """One array on stdout, written as its elements come: there may be a million."""
    separator = "["
    for document in documents:
        sys.stdout.write(f"{separator}\n  {json.dumps(document)}")
        separator = ","
    sys.stdout.write("[]\n" if separator == "[" else "\n]\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | None]]) -> None:
    """A table on stdout. On a terminal long cells are folded, elsewhere each row is one line."""
    if not sys.stdout.isatty():
        _print_lines([column.upper() for column in columns], [[cell or "-" for cell in row] for row in rows])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell or "-") for cell in row))
    console.print(table)


def _print_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns in line, without the layout of a terminal: that takes a second for each thousand rows."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, cells)) for cells in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_fields(fields: Iterable[tuple[str, str | None]]) -> None:
    """Names and values below each other; a value that is None is left out."""
    shown = [(name, value) for name, value in fields if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def remark(text: str) -> None:
    """Something to know, on stderr."""
    print(text, file=sys.stderr)


def warn(text: str) -> None:
    """Something to look at, on stderr."""
    print(f"warning: {text}", file=sys.stderr)
