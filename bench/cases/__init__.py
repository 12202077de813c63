"""The cases of the suite, in the order of the report. Each measures one thing and can be run alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench import imports, messages
from bench.cases import changes, growth, handshake, memory, pump, stream
from bench.suite import Suite

__all__ = ["CASES", "Case"]


@dataclass(frozen=True, slots=True)
class Case:
    """One file of results and one section of the report."""

    run: Callable[[Suite], None]
    rounds: int = 5
    quick_rounds: int = 2


CASES: Mapping[str, Case] = {
    "handshake": Case(handshake.run),
    "pump": Case(pump.run, rounds=15, quick_rounds=1),
    "stream": Case(stream.run),
    "memory": Case(memory.run, rounds=3, quick_rounds=1),
    "messages": Case(messages.run),
    "changes": Case(changes.run, rounds=10),
    "growth-registry": Case(growth.by_registry, quick_rounds=1),
    "growth-sessions": Case(growth.by_sessions, quick_rounds=1),
    "growth-workers": Case(growth.by_workers, quick_rounds=1),
    "growth-restart": Case(growth.restart, rounds=3, quick_rounds=1),
    "import": Case(imports.run, rounds=1, quick_rounds=1),
}
