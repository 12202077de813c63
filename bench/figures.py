"""The names of the figures in a result, and how tables show them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["FIGURES", "Figure"]


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure is called and written."""

    label: str
    unit: str
    digits: int = 0
    scale: float = 1.0

    def head(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float) -> str:
        return f"{value * self.scale:,.{self.digits}f}"

    def spread(self, values: Sequence[float]) -> str:
        """The median, with the range in brackets."""
        middle = self.text(statistics.median(values))
        return f"{middle} ({self.text(min(values))}-{self.text(max(values))})" if len(values) > 1 else middle


FIGURES: Final[Mapping[str, Figure]] = {
    "cpu_us": Figure("CPU per connection", "us"),
    "trip_us": Figure("CPU per round trip", "us", 1),
    "message_us": Figure("CPU per message", "us", 1),
    "gb_s": Figure("CPU per GB", "s", 2),
    "session_kib": Figure("per session", "KiB", 1),
    "resident_kib": Figure("with file pages", "KiB", 1),
    "empty_mib": Figure("all processes without sessions", "MiB"),
    "memory_mib": Figure("all processes", "MiB"),
    "felt_s": Figure("felt after", "s", 3),
    "ready_s": Figure("ready after", "s", 2),
    "back_s": Figure("then all back after", "s", 2),
    "whole_s": Figure("together", "s", 2),
    "import_s": Figure("import", "s", 1),
    "cpu_s": Figure("CPU", "s", 1),
    "resident_mib": Figure("resident at most", "MiB"),
    "following_s": Figure("CPU of the gateway that follows", "s", 1),
    "lag_s": Figure("last device let in after", "s", 1),
    "per_s": Figure("acknowledged", "per s"),
    "p50_us": Figure("p50", "us"),
    "p99_us": Figure("p99", "us"),
    "p999_us": Figure("p99.9", "us"),
    "server_busy": Figure("server busy", "%", 0, 100),
    "generator_busy": Figure("generator busy", "%", 0, 100),
}
