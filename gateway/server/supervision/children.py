"""Child processes of the supervisor: each is started, configured, spoken to, and started again when it ends.

A child is `python -m MODULE FD FD`, exec'ed and never only forked. The first descriptor is its end of the control channel,
over the second it gets descriptors (SCM_RIGHTS). It gets no setting by argument or environment: those can be read by
others of the machine. A child is waited for by its pidfd, so that one image of the supervisor can hand it to the next.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, Self

import msgspec
import structlog

import gateway
from gateway.errors import ControlError
from gateway.server.control.channel import Answer, Channel, DetachedChannel, Handler
from gateway.server.control.messages import Configure, Message, Metrics
from gateway.telemetry.aggregate import Snapshot, retire

__all__ = ["Child", "HandedChild"]

log = structlog.get_logger()

_BACK_OFF_FIRST_S: Final = 0.25
_BACK_OFF_MAX_S: Final = 10.0
_WELL_AFTER_S: Final = 10.0
"""A child that lived this long is started again at once; one that did not waits, each time twice as long."""
_COLLECT_TIMEOUT_S: Final = 1.0
_DESCRIPTORS_MAX: Final = 200
"""In one message; the kernel takes 253."""


class HandedChild(msgspec.Struct, frozen=True):
    """A child, as one image of the supervisor hands it to the next."""

    name: str
    pid: int
    control: int
    rest: bytes
    next_number: int
    descriptors: int
    is_ready: bool
    departed: Snapshot
    last: Snapshot


class _Process:
    """One process, started by this image of the supervisor or by the one before."""

    def __init__(self, pid: int, descriptors: socket.socket) -> None:
        self.pid: Final = pid
        self.descriptors: Final = descriptors
        self._pidfd = os.pidfd_open(pid)
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    def start(cls, module: str, control: socket.socket) -> Self:
        """Start one, with `control` as its end of the control channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - our own program
                [
                    sys.executable,
                    "-P",  # import nothing from the current directory
                    "-m",
                    module,
                    str(control.fileno()),
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(control.fileno(), theirs.fileno()),
                env=_environment(),
            )
        process.returncode = 0  # it is waited for here, and not by its Popen
        return cls(process.pid, ours)

    async def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self.descriptors.close()
        if not self._ended.done():
            self._ended.set_result(os.waitstatus_to_exitcode(status))


class Child:
    """One place for a child process, whichever process fills it just now.

    `started` is told of each new process, `ended` of each that is gone: whether it ended by itself.
    """

    def __init__(
        self,
        name: str,
        module: str,
        configuration: "Callable[[Child], Configure]",
        handler: Handler,
        *,
        started: "Callable[[Child], object] | None" = None,
        ended: Callable[[bool], object] | None = None,
    ) -> None:
        self.name = name
        self.is_ready = False
        self._module = module
        self._configuration = configuration
        self._handler = handler
        self._started = started
        self._ended = ended
        self._channel: Channel | None = None
        self._process: _Process | None = None
        self._handed: HandedChild | None = None
        self._next_channel: asyncio.Future[Channel | None] | None = None
        """while the process is handed over: the channel that `take_back` makes"""
        self._stopped_by: Message | None = None
        self._stop = asyncio.Event()
        self.gone = asyncio.Event()
        """the last process of this place has ended"""
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

    @property
    def departed(self) -> Snapshot:
        """What the processes that are gone had counted."""
        return self._departed

    async def keep(self) -> None:
        """Keep a process in this place until `stop`; or the one that was adopted, until it ends."""
        if self._channel is not None and self._process is not None:
            await self._converse(self._channel, self._process)
            if self._ended is not None:
                self._ended(False)
        else:
            await self._start_again_and_again()
        self.gone.set()

    async def _start_again_and_again(self) -> None:
        loop = asyncio.get_running_loop()
        back_off_s = 0.0
        while not self._stop.is_set():
            began = loop.time()
            status = await self._live()
            if self._ended is not None:
                self._ended(not self._stop.is_set())
            if self._stop.is_set():
                return
            back_off_s = (
                0.0
                if loop.time() - began >= _WELL_AFTER_S
                else min(max(back_off_s * 2, _BACK_OFF_FIRST_S), _BACK_OFF_MAX_S)
            )
            log.error("child_ended", child=self.name, status=status, restart_in_s=back_off_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), back_off_s)

    async def adopt(self, handed: HandedChild) -> None:
        """Take a process that another image of the supervisor started; `keep` does not start another one after it."""
        self._stop.set()
        self._departed, self._last, self.is_ready = handed.departed, handed.last, handed.is_ready
        descriptors = socket.socket(fileno=handed.descriptors)
        descriptors.setblocking(False)
        self._process = _Process(handed.pid, descriptors)
        self._channel = await Channel.attach(_channel_of(handed), self._handle)

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
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()

    @property
    def takes_reports(self) -> bool:
        """Whether there is a process, and one that stays: what another is told late would end with it."""
        return self._channel is not None and not self._stop.is_set()

    def notify(self, message: Message) -> None:
        """Tell the process something, if there is one."""
        if self._channel is not None:
            self._channel.notify(message)

    async def call(self, message: Message, timeout_s: float) -> Message:
        """Ask the process something. Raises ControlError when there is none or it does not answer."""
        if self._channel is None:
            raise ControlError(f"{self.name} is being started again: try once more")
        return await self._channel.call(message, timeout_s)

    def lend(self, descriptors: Sequence[int]) -> None:
        """Send descriptors, before the message that tells of them. Raises ControlError when the process is stuck."""
        if self._process is None:
            return
        for first in range(0, len(descriptors), _DESCRIPTORS_MAX):
            try:
                some = descriptors[first : first + _DESCRIPTORS_MAX]
                socket.send_fds(self._process.descriptors, [b"\0"], list(some))
            except OSError as exc:
                raise ControlError(f"{self.name} takes no descriptors: {exc.strerror}") from exc

    async def collect(self, message: Message) -> None:
        """Ask for the metrics of the process; of a hung one the last values stay."""
        try:
            answer = await self.call(message, _COLLECT_TIMEOUT_S)
        except ControlError:
            self._is_silent = True
        else:
            assert isinstance(answer, Metrics)
            self._last = answer.families
            self._is_silent = False

    @property
    def collected(self) -> Snapshot:
        """Metrics of this place over all its processes, as of the last `collect` or good-bye."""
        return [*self._departed, *self._last]

    async def hand_over(self) -> HandedChild | None:
        """Let go of the process for another image of the supervisor; None when there is none, or it had to be killed.

        `take_back` undoes it.
        """
        if self._channel is None or self._process is None:
            return None
        process = self._process
        self._next_channel = asyncio.get_running_loop().create_future()
        try:
            channel = await self._channel.detach()
        except ControlError as exc:
            log.error("child_killed", child=self.name, reason=str(exc))
            process.kill()
            self._next_channel.set_result(None)
            return None
        self._handed = HandedChild(
            self.name,
            process.pid,
            channel.descriptor,
            channel.rest,
            channel.next_number,
            process.descriptors.fileno(),
            self.is_ready,
            self._departed,
            self._last,
        )
        return self._handed

    async def take_back(self) -> None:
        """There is no other image of the supervisor: go on."""
        if self._handed is not None:
            assert self._next_channel is not None
            self._next_channel.set_result(await Channel.attach(_channel_of(self._handed), self._handle))
            self._handed = None

    async def _live(self) -> int:
        """One process from start to end; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process = _Process.start(self._module, theirs)
        ours.setblocking(False)
        self._channel = await Channel.over(ours, self._handle)
        log.debug("child_started", child=self.name, pid=process.pid)
        with contextlib.suppress(ControlError):  # it is gone already, and `_converse` says so
            self._channel.notify(self._configuration(self))
        if self._started is not None:
            self._started(self)
        if self._stopped_by is not None:  # told while this process was being started
            self._channel.notify(self._stopped_by)
        return await self._converse(self._channel, process)

    async def _converse(self, channel: Channel, process: _Process) -> int:
        """Until the process ends; over as many channels as there are images of the supervisor."""
        try:
            next_channel: Channel | None = channel
            while next_channel is not None:
                self._channel = next_channel
                await next_channel.serve()
                if self._next_channel is None:
                    break
                next_channel = await self._next_channel
                self._next_channel = None
            return await process.wait()
        finally:
            self.is_ready = False
            self._channel = self._process = None
            self._departed = retire(self._departed, self._last)
            self._last = []
            self._is_silent = False

    async def _handle(self, message: Message) -> Answer:
        if isinstance(message, Metrics):  # a process that ends says good-bye with its last values
            self._last = message.families
            return None
        return await self._handler(message)


def _channel_of(handed: HandedChild) -> DetachedChannel:
    return DetachedChannel(handed.control, handed.rest, handed.next_number)


def _environment() -> dict[str, str]:
    """What a child inherits: no setting of ours, since those may hold secrets, nothing for the service manager's ear, and
    the same code as the parent's.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PSKGW_", "WATCHDOG_")) and name != "NOTIFY_SOCKET"
    }
    code = str(Path(gateway.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join([code, *filter(None, [kept.get("PYTHONPATH")])])
    return kept
