"""The follower process: drives the registry's follower, and tells the supervisor what it finds.

Started by the supervisor as `python -m gateway.server.processes.follower CONTROL SOCKETS`, as `worker` is; it needs no sockets.
Everything that may wait for the database or the disk runs in one thread beside the event loop, so that metrics and the
order to stop are answered meanwhile.
"""

import asyncio
import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from gateway.errors import RegistryError, RegistryMismatch
from gateway.registry.follower import Follower
from gateway.registry.listener import can_listen, listen
from gateway.registry.masterkeys import KeyRing
from gateway.registry.notices import Published
from gateway.registry.reports import Newcomer, Reports
from gateway.server.control.channel import Channel
from gateway.server.control.messages import (
    CheckReaders,
    Collect,
    CommandDelivered,
    Drain,
    FollowerStatus,
    Message,
    Metrics,
    Newcomers,
    Used,
)
from gateway.server.processes.child import configured, live, run_child
from gateway.server.processes.follower_settings import FollowerSettings
from gateway.server.processes.heap import give_back_large_blocks
from gateway.server.processes.keys import refresh_keys
from gateway.telemetry.aggregate import snapshot
from gateway.telemetry.logs import setup
from gateway.telemetry.metrics import FollowerMetrics

log = structlog.get_logger()

_RETRY_MAX_S: Final = 5.0
"""A registry that is away is asked again at least this often."""
_COUNT_EVERY_S: Final = 60.0
_EXPIRING_WITHIN_S: Final = 14 * 86_400.0
"""Time enough to reach the devices of a fleet before they are shut out."""
_PROGRESS_EVERY_S: Final = 0.5
_PROGRESS_LOGGED_EVERY_S: Final = 5.0
_GATHER_S: Final = 0.02
"""Between word of a change and the look at it: of a hundred writes a second, those of a moment are taken together."""
_HEAD_EVERY_S: Final = 3600.0
_DELIVERED_PER_POLL: Final = 1_000


class FollowerProcess:
    """The life of the follower: poll, tell, wait."""

    def __init__(self, settings: FollowerSettings, channel: Channel) -> None:
        self._settings = settings
        self._channel = channel
        self._registry = CollectorRegistry()
        self._metrics = FollowerMetrics(self._registry)
        self._follower = Follower(settings.registry, settings.data_dir / "replica", wall=time.time)
        self._keys = KeyRing(settings.master_keys)
        self._reports = Reports(settings.registry, self._keys.sealer, time.time)
        self._reports_failed = ""
        self._head_at = -_HEAD_EVERY_S
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        """Something is there to be done before the next look at the registry is due."""
        self._said = ""
        self._fault: str | None = None
        self._progress_logged_at = -_PROGRESS_LOGGED_EVERY_S
        self._delivered: list[CommandDelivered] = []
        self._readers_to_check = False
        self._started_at = time.time()
        self._counted_at = -_COUNT_EVERY_S
        self._counting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._counting.set_result(None)

    async def run(self) -> None:
        """Follow until `stop`."""
        loop = asyncio.get_running_loop()
        generation = await loop.run_in_executor(self._thread, self._follower.open)
        if generation is not None:
            self._tell("starting", "the follower is starting")  # how old what it publishes is
            self._channel.notify(Published(str(generation), self._follower.status.sequence))
        listening = self._listen()
        wait_s = 0.0
        while not self._stop.is_set():
            self._wake.clear()  # what is heard from here on may have missed this poll
            wait_s = await self._poll(wait_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
                await asyncio.sleep(_GATHER_S)
        listening.cancel()
        self._counting.cancel()
        await self._write_what_is_left()
        await loop.run_in_executor(self._thread, self._reports.close)
        await loop.run_in_executor(self._thread, self._follower.close)
        self._thread.shutdown(wait=False)

    def stop(self) -> None:
        """Let `run` return after the poll under way."""
        self._stop.set()
        self._wake.set()

    def _listen(self) -> asyncio.Future[None]:
        """Look at the registry when it says that it changed, where it does."""
        loop = asyncio.get_running_loop()
        url = self._settings.registry.url
        return loop.create_task(listen(url, self._wake.set)) if can_listen(url) else loop.create_future()

    async def handle(self, message: Message) -> Message | None:
        """What the supervisor says."""
        match message:
            case Collect():
                return self.metrics()
            case CheckReaders():
                self._readers_to_check = True
                self._wake.set()
            case CommandDelivered():
                self._delivered.append(message)
            case Used():
                self._reports.add_uses(message.credentials)
            case Newcomers():
                self._reports.add_newcomers(Newcomer(*each) for each in message.identities)
            case Drain():
                self.stop()
            case _:
                raise AssertionError(f"a follower is not told {type(message).__name__}")
        return None

    def metrics(self) -> Metrics:
        """All metrics of this process as they are now."""
        status = self._follower.status
        self._metrics.revision.set(status.sequence)
        # A registry that was never read is as old as this process.
        self._metrics.age.set(max(0.0, time.time() - (status.polled_at or self._started_at)))
        return Metrics(snapshot(self._registry))

    async def _poll(self, waited_s: float) -> float:
        """One poll; seconds until the next."""
        loop = asyncio.get_running_loop()
        if self._readers_to_check:
            self._readers_to_check = False
            await loop.run_in_executor(self._thread, self._follower.reader_check)
        try:
            await self._remove_delivered()
            polling = loop.run_in_executor(self._thread, self._follower.poll)
            while not (await asyncio.wait({polling}, timeout=_PROGRESS_EVERY_S))[0]:
                self._tell_progress()
            for notice in polling.result():
                self._channel.notify(notice)
        except RegistryError as exc:
            self._tell("mismatch" if isinstance(exc, RegistryMismatch) else "away", str(exc))
            return min(max(waited_s * 2, self._settings.registry.poll_interval_s), _RETRY_MAX_S)
        self._tell("following", "")
        await loop.run_in_executor(self._thread, refresh_keys, self._keys)
        if self._reports.is_due and await self._write_reports():
            return 0.0  # what was written is read at once
        await self._log_head()
        if loop.time() - self._counted_at >= _COUNT_EVERY_S and self._counting.done():
            self._counted_at = loop.time()
            self._counting = loop.create_task(self._count_credentials())
        return 0.0 if self._follower.behind else self._settings.registry.poll_interval_s

    async def _remove_delivered(self) -> None:
        """Commands that were delivered wait no longer; while the registry is away they are remembered here."""
        delivered = self._delivered[:_DELIVERED_PER_POLL]
        if delivered:
            loop = asyncio.get_running_loop()
            numbers = [command.number for command in delivered]
            await loop.run_in_executor(self._thread, self._follower.remove_commands, numbers)
            del self._delivered[: len(delivered)]

    async def _write_what_is_left(self) -> None:
        """The end has come. A registry that is away may keep this process until it is killed, so the next follower, if
        there is one, is left the delivered commands first: to remove them twice does no harm. What else is lost is
        reported again, by sessions that live on.
        """
        for command in self._delivered:
            self._channel.notify(command)
        with contextlib.suppress(RegistryError):
            while self._delivered:
                await self._remove_delivered()
        while self._reports.has_any and await self._write_reports():
            pass

    async def _write_reports(self) -> bool:
        """Write what workers reported; whether that went well."""
        loop = asyncio.get_running_loop()
        try:
            enrolments = await loop.run_in_executor(self._thread, self._reports.flush)
        except RegistryError as exc:
            if (reason := str(exc)) != self._reports_failed:
                log.warning("reports_not_written", reason=reason, note="they are kept and tried again")
                self._reports_failed = reason
            return False
        self._reports_failed = ""
        for newcomer, refused in enrolments:
            self._metrics.enrolments.labels("added" if refused is None else "refused").inc()
            log.info(
                "device_enrolled" if refused is None else "enrolment_refused",
                device=newcomer.identity,
                address=newcomer.address,
                **({} if refused is None else {"reason": refused}),
            )
        return True

    async def _log_head(self) -> None:
        """Once an hour: a head that is kept apart from the database finds an audit that was cut off."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._head_at < _HEAD_EVERY_S:
            return
        with contextlib.suppress(RegistryError):  # the next poll meets it, too, and tells
            head = await loop.run_in_executor(self._thread, self._reports.audit_head)
            if head is not None:
                log.info("audit_head", head=str(head))
            self._head_at = loop.time()

    async def _count_credentials(self) -> None:
        """Refresh the gauge, once a minute: it is never counted at a scrape."""
        with contextlib.suppress(RegistryError):  # the next poll meets it, too, and tells
            counts = await asyncio.to_thread(self._follower.credential_states)
            for state, count in counts.items():
                self._metrics.credentials.labels(state).set(count)
            self._metrics.expiring.set(
                await asyncio.to_thread(self._follower.devices_expiring, _EXPIRING_WITHIN_S)
            )
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._follower.remove_expired_commands
            )

    def _tell_progress(self) -> None:
        progress = self._follower.progress
        if progress is not None:
            self._tell(
                "copying", f"copying the registry: {progress.copied:,} of {progress.total:,} credentials"
            )

    def _tell(self, state: str, detail: str) -> None:
        """Tell the supervisor how things stand, and log what is new."""
        status = self._follower.status
        self._channel.notify(FollowerStatus(state, detail, status.sequence, status.polled_at))
        if status.fault != self._fault:
            self._fault = status.fault
            if status.fault is not None:
                log.warning(
                    "replica_unwritable",
                    reason=status.fault,
                    note="it is kept in memory until it can be written",
                )
        if (said := f"{state} {detail}") == self._said:
            return
        if state in ("away", "mismatch"):
            log.warning(
                "registry_unusable",
                state=state,
                reason=detail,
                note="devices go on as the replica knows them",
            )
        elif state == "copying":
            if asyncio.get_running_loop().time() - self._progress_logged_at < _PROGRESS_LOGGED_EVERY_S:
                return
            self._progress_logged_at = asyncio.get_running_loop().time()
            log.info("replica_copying", progress=detail)
        elif self._said.startswith(("away", "mismatch")):
            log.info("registry_back", sequence=status.sequence)
        self._said = said


async def _main(control_fd: int) -> None:
    channel, configuration = await configured(control_fd)
    settings = FollowerSettings.model_validate_json(configuration.settings)
    setup(settings.log, process="follower")
    give_back_large_blocks()  # such as what SQLite sorts for the count of each minute
    process = FollowerProcess(settings, channel)
    await live(process.run(), channel, process.handle, process.stop, process.metrics)


if __name__ == "__main__":
    run_child(_main(int(sys.argv[1])))
