"""Devices that come and go on threads, and what each visit was like."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Self

from tests.support.devices import Refused, TlsDevice
from tests.support.gateway import Device

__all__ = ["Repeated", "Visit", "visits_by"]

PAUSE_S = 0.02
"""Between two rounds of each thread: a load that leaves a machine of two cores something to start a process with."""


class Repeated:
    """Does something again and again on a thread until the block is left; what it raises is raised there."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.count = 0
        self._action = action
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and exc_info[0] is None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(PAUSE_S):
                self._action()
                self.count += 1
        except BaseException as exc:  # noqa: BLE001 - raised again by the owner
            self._error = exc


@dataclasses.dataclass
class Visit:
    """One attempt to connect and to exchange something."""

    began: float
    ended: float
    served: bool


def visits_by(port: int, device: Device, visits: list[Visit]) -> Callable[[], None]:
    """An action: connect, exchange, leave."""

    def visit() -> None:
        began = time.monotonic()
        try:
            with TlsDevice.connect(port, device) as connection:
                connection.echo(b"visit")
            served = True
        except (Refused, ConnectionError, AssertionError):
            served = False
        visits.append(Visit(began, time.monotonic(), served))

    return visit
