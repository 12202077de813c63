"""What the service manager is told: ready, reloading, stopping, alive, and one line of status (sd_notify(3)).

A datagram of `NAME=value` lines to the socket that `$NOTIFY_SOCKET` names; without one nothing is said. Own code,
since it is these few lines, and the packages that have them are unmaintained (sdnotify) or need C (systemd-python).
"""

import os
import socket
import time
from collections.abc import Mapping

import structlog

__all__ = ["ServiceManager"]

log = structlog.get_logger()


class ServiceManager:
    """Says things to the service manager. Saying something never fails: a log line tells that it did not arrive."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        self._said = ""
        self.watchdog_s = _watchdog_s(environ)
        """it wants to hear `alive` this often, in seconds; None: it does not watch"""

    def ready(self, status: str) -> None:
        """Devices can connect; or a reload is over, whatever came of it."""
        self._say("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """A reload has begun; systemd 253 and later wait for `ready` and want to know when it began."""
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading")

    def stopping(self) -> None:
        """It ends."""
        self._say("STOPPING=1", "STATUS=stopping")

    def starting(self, status: str, within_s: float) -> None:
        """Not ready yet, and not stuck: wait so much longer."""
        self._say(f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}", f"STATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`; said again only when it is another."""
        if status != self._said:
            self._say(f"STATUS={status}")

    def alive(self) -> None:
        """For the watchdog."""
        self._say("WATCHDOG=1")

    def _say(self, *lines: str) -> None:
        if not self._path:
            return
        for line in lines:
            if line.startswith("STATUS="):
                self._said = line.removeprefix("STATUS=")
        # A name that begins with @ is in the abstract namespace: a NUL byte stands there.
        path = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        text = "\n".join(" ".join(line.splitlines()) for line in lines)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(text.encode("utf-8", "replace"), path)
        except OSError as exc:
            log.warning("service_manager_deaf", reason=exc.strerror or str(exc))


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """`$WATCHDOG_USEC`, if it is meant for this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or not int(usec) or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 1e6
