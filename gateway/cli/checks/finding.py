"""One line of the report."""

from typing import Literal

import msgspec

__all__ = ["Finding", "Status"]

Status = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    check: str
    status: Status
    detail: str
    fix: str = ""
