"""Child processes of the supervisor: each is started, configured, spoken to, and started again when it ends.

A child is `python -m MODULE FD`, exec'ed and never only forked, with one end of a socket pair as its control channel.
It gets no setting by argument or environment: those can be read by others of the machine.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import structlog

import gateway
from gateway.errors import ControlError
from gateway.server.control import Channel, Configure, Handler, Message, Metrics
from gateway.telemetry.aggregate import Snapshot, retire

__all__ = ["Child"]

log = structlog.get_logger()

_BACK_OFF_FIRST_S: Final = 0.25
_BACK_OFF_MAX_S: Final = 10.0
_WELL_AFTER_S: Final = 10.0
"""A child that lived this long is started again at once; one that did not waits, each time twice as long."""
_COLLECT_TIMEOUT_S: Final = 1.0


class Child:
    """One place for a child process, whichever process fills it just now."""

    def __init__(
        self,
        name: str,
        module: str,
        configuration: Callable[[], Configure],
        handler: Handler,
        *,
        started: "Callable[[Child], object] | None" = None,
        ended: Callable[[], object] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.is_ready = False
        self._module = module
        self._configuration = configuration
        self._handler = handler
        self._started = started
        self._ended = ended
        self._inherited = tuple(inherited)
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopped_by: Message | None = None
        self._stop = asyncio.Event()
        self._last: Snapshot = []
        self._departed: Snapshot = []
        self._is_silent = False

    @property
    def pid(self) -> int | None:
        """Of the process that fills the place, None between two of them."""
        return None if self._process is None else self._process.pid

    @property
    def state(self) -> Literal["ready", "starting", "silent"]:
        """How it was at the last `collect`: a process that is there and did not answer is silent."""
        if self._is_silent and self._process is not None:
            return "silent"
        return "ready" if self.is_ready else "starting"

    async def keep(self) -> None:
        """Keep a process in this place until `stop`."""
        loop = asyncio.get_running_loop()
        back_off_s = 0.0
        while not self._stop.is_set():
            began = loop.time()
            status = await self._live()
            if self._stop.is_set():
                return
            if self._ended is not None:
                self._ended()
            back_off_s = (
                0.0
                if loop.time() - began >= _WELL_AFTER_S
                else min(max(back_off_s * 2, _BACK_OFF_FIRST_S), _BACK_OFF_MAX_S)
            )
            log.error("child_ended", child=self.name, status=status, restart_in_s=back_off_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), back_off_s)

    async def stop(self, message: Message, within_s: float) -> None:
        """Tell the process to end, and kill it if it does not `within_s` seconds."""
        self._stopped_by = message
        self._stop.set()
        self.notify(message)
        process = self._process
        if process is None:
            return
        try:
            async with asyncio.timeout(within_s):
                await process.wait()
        except TimeoutError:
            log.error("child_killed", child=self.name, reason=f"it did not end within {within_s:g} s")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def notify(self, message: Message) -> None:
        """Tell the process something, if there is one."""
        if self._channel is not None:
            self._channel.notify(message)

    async def call(self, message: Message, timeout_s: float) -> Message:
        """Ask the process something. Raises ControlError when there is none or it does not answer."""
        if self._channel is None:
            raise ControlError(f"{self.name} is being started again: try once more")
        return await self._channel.call(message, timeout_s)

    async def collect(self, message: Message) -> Snapshot:
        """Metrics of this place over all its processes; of a hung one the last values."""
        try:
            answer = await self.call(message, _COLLECT_TIMEOUT_S)
        except ControlError:
            self._is_silent = True
        else:
            assert isinstance(answer, Metrics)
            self._last = answer.families
            self._is_silent = False
        return [*self._departed, *self._last]

    async def _live(self) -> int:
        """One process from start to end; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # import nothing from the current directory
                "-m",
                self._module,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *self._inherited),
                env=_environment(),
            )
        ours.setblocking(False)
        channel = self._channel = await Channel.over(ours, self._handle)
        log.debug("child_started", child=self.name, pid=self._process.pid)
        try:
            channel.notify(self._configuration())
            if self._started is not None:
                self._started(self)
            if self._stopped_by is not None:  # told while this process was being started
                channel.notify(self._stopped_by)
            await channel.serve()
            return await self._process.wait()
        finally:
            self.is_ready = False
            self._channel = self._process = None
            self._departed = retire(self._departed, self._last)
            self._last = []
            self._is_silent = False

    async def _handle(self, message: Message) -> Message | None:
        if isinstance(message, Metrics):  # a process that ends says good-bye with its last values
            self._last = message.families
            return None
        return await self._handler(message)


def _environment() -> dict[str, str]:
    """What a child inherits: no setting of ours, since those may hold secrets, and the same code as the parent's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PSKGW_")}
    code = str(Path(gateway.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join([code, *filter(None, [kept.get("PYTHONPATH")])])
    return kept
