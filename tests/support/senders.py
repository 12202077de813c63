"""A sender that does what a test says when its route is free again."""

from collections.abc import Callable

__all__ = ["Paused"]


class Paused:
    """Stands where a session of a framed route would."""

    def __init__(self, resume: Callable[[], object]) -> None:
        self._resume = resume

    def route_is_free(self) -> None:
        self._resume()
