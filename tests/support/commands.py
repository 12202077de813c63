"""What a gatewayctl command left behind, run in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Done", "Run"]


@dataclass(frozen=True)
class Done:
    """Exit status and output of a command."""

    status: int | str | None
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its JSON document: the only thing on stdout."""
        return json.loads(self.out)


Run = Callable[..., Done]
"""Arguments, `stdin` and the `status` that is expected."""
