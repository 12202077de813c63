"""A worker process: accepts devices and serves them until it is told to drain, or until the supervisor is gone.

Started by the supervisor as `python -m gateway.server.worker FD`, where FD is its end of the control channel; the first
message configures it. It owns its listeners, look-up, routes and sessions, and touches nothing that another process
owns: it reads the replica, and never the registry.
"""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict

from gateway.errors import ControlError, RegistryError
from gateway.forward.route import RouteTable
from gateway.forward.settings import BackendSettings, RouteSettings
from gateway.net.acceptor import Acceptor
from gateway.net.poller import Poller
from gateway.registry.masterkeys import KeyRing, MasterKeySource
from gateway.registry.notices import Changed, Published
from gateway.server.command_sources import CommandSources
from gateway.server.commands import CommandSender
from gateway.server.connection import DeviceConnection
from gateway.server.control import (
    Channel,
    Collect,
    CommandDelivered,
    Configure,
    DiscardDeadLetters,
    Done,
    Drain,
    EndSession,
    FollowerStatus,
    Kick,
    ListDeadLetters,
    ListSessions,
    Message,
    Metrics,
    RetryDeadLetters,
    SendCommand,
    Sessions,
)
from gateway.server.dead_letters import handle_dead_letters
from gateway.server.deadlines import TICK_S, Deadlines
from gateway.server.ending import STOP_S, EndingConnection
from gateway.server.keys import refresh_keys
from gateway.server.life import SessionLife
from gateway.server.limits import ConnectionLimits
from gateway.server.listener import Listener
from gateway.server.lookup import NEWCOMER, DeviceLookup, refusal
from gateway.server.loop import run
from gateway.server.routes import LiveRoutes
from gateway.server.services import Services
from gateway.server.sessions import SessionIndex
from gateway.server.settings import LimitsSettings, ListenerSettings
from gateway.server.trace_messages import StartTrace, StopTrace
from gateway.server.tracing import Tracers
from gateway.telemetry.aggregate import snapshot
from gateway.telemetry.connection_log import ConnectionLog
from gateway.telemetry.logs import LogSettings, setup
from gateway.telemetry.metrics import Outcome, WorkerMetrics
from gateway.tls.contexts import ContextStore

__all__ = ["Worker", "WorkerSettings", "process_name"]

log = structlog.get_logger()

BACKLOG: Final = 4096
"""Connections that the kernel completes and keeps while the worker is busy (bounded by net.core.somaxconn)."""


_KEYS_EVERY_S: Final = 2.0
"""How often the file with the master keys is looked at: one more key may be there."""
GC_THRESHOLDS: Final = (20_000, 50, 50)
"""Sessions leave no cycles behind, so looking for some at every 700 objects, as is Python's default, finds nothing."""


_SETTLE_SHARE: Final = 0.8
"""Of the drain window: so long may backends take for what was received; the rest is for the last words."""


class WorkerSettings(BaseModel):
    """What of the configuration a worker needs."""

    model_config = ConfigDict(frozen=True)

    log: LogSettings
    data_dir: Path
    drain_s: float
    max_staleness_s: float
    master_keys: MasterKeySource
    limits: LimitsSettings
    listeners: tuple[ListenerSettings, ...]
    routes: tuple[RouteSettings, ...]
    backends: dict[str, BackendSettings]


def process_name(number: int) -> str:
    """What the worker in this place is called in logs and lists."""
    return f"worker-{number}"


class Worker:
    """All of one worker. `serve` is its life."""

    def __init__(
        self,
        settings: WorkerSettings,
        number: int,
        workers: int,
        sockets: dict[str, list[int]],
        tell: Callable[[Message], None],
    ) -> None:
        self._settings = settings
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._registry = CollectorRegistry()
        self._sockets = {
            name: [socket.socket(fileno=number) for number in numbers] for name, numbers in sockets.items()
        }
        metrics = WorkerMetrics(self._registry)
        self._observe_revocation = metrics.revocation.observe
        self._keys = KeyRing(settings.master_keys)
        self._lookup = DeviceLookup(self._keys.sealer, metrics, max_staleness_s=settings.max_staleness_s)
        self._contexts = ContextStore()
        self._routes = LiveRoutes(
            RouteTable(settings.routes, settings.backends),
            metrics,
            self._spawn,
            message_bytes_max=settings.limits.message_bytes_max,
            stdout_lock=settings.data_dir / "stdout.lock",
            spool_dir=settings.data_dir / "spool",
            workers=workers,
            soon=self._loop.call_soon,
        )
        self._sessions: SessionIndex[DeviceConnection] = SessionIndex()
        self._commands = CommandSender(
            sessions=self._sessions.of_device,
            waiting=self._lookup.commands,
            report=tell,
            now=time.monotonic,
            wall=time.time,
            later=self._loop.call_later,
        )
        self._command_sources = CommandSources(
            settings.backends, tell, payload_bytes_max=settings.limits.message_bytes_max, wall=time.time
        )
        self._life = SessionLife(
            self._sessions,
            self._lookup,
            settings.limits.sessions_per_device,
            tell,
            self._observe_revocation,
        )
        self._deadlines: Deadlines[EndingConnection] = Deadlines(time.monotonic())
        self._tracers = Tracers(tell, self._lookup, settings.limits, settings.listeners, time.time)
        process = process_name(number)
        self._connection_log = ConnectionLog(settings.log, process, sys.stderr.buffer, time.monotonic)
        self._services = Services(
            settings=settings.limits,
            now=time.monotonic,  # uvloop's own clock stands still within a turn of the loop
            wall=time.time,
            limits=ConnectionLimits(settings.limits, workers),
            deadlines=self._deadlines,
            lookup=self._lookup,
            routes=self._routes,
            life=self._life,
            commands=self._commands,
            is_debugging=settings.log.level == "debug",
            connection_log=self._connection_log,
            tracers=self._tracers,
            process=process,
        )
        self._listeners = [
            Listener(listener, self._routes.alpn, self._lookup, self._contexts, metrics)
            for listener in settings.listeners
        ]
        self._keys_looked_at = time.monotonic()
        self._sequence = 0
        self._poller = Poller(self._loop)
        self._acceptors: list[Acceptor] = []
        self._draining = asyncio.Event()
        self._drain_s = settings.drain_s

    async def serve(self) -> None:
        """Serve until `drain` is called, then end every session and return."""
        await self._routes.open()
        if self._number == 0:  # one subscription per node
            self._spawn(self._command_sources.run())
        self._tick()
        await self._draining.wait()
        await self._drain()

    def drain(self, drain_s: float) -> None:
        """Stop accepting and let `serve` return within `drain_s` seconds."""
        self._drain_s = drain_s
        self._draining.set()

    async def handle(self, message: Message) -> Message | None:
        """What the supervisor says."""
        match message:
            case Published() | Changed() | FollowerStatus():
                await self._follow(message)
            case Collect():
                return self.metrics()
            case ListSessions() | Kick() | SendCommand():
                return self._about_sessions(message)
            case CommandDelivered():
                self._commands.settled(message.device_id, message.number)
            case ListDeadLetters() | RetryDeadLetters() | DiscardDeadLetters():
                return await handle_dead_letters(self._routes, message)
            case StartTrace() | StopTrace():
                self._tracers.handle(message)
            case EndSession():
                self._end_session(message)
            case Drain():
                self.drain(message.drain_s)
            case _:
                raise AssertionError(f"a worker is not told {type(message).__name__}")
        return None

    def _about_sessions(self, message: ListSessions | Kick | SendCommand) -> Message | None:
        """What operators ask and want of live sessions."""
        found = self._sessions.named(message.realm, message.device)
        match message:
            case ListSessions():
                wanted = (each for each in found if message.route in (None, each.route_name))
                return Sessions([session.describe() for session in wanted])
            case Kick():
                for session in found:
                    session.stop("kicked")
                return Done(len(found))
            case SendCommand():
                newest = next((each for each in found if each.session_id == message.session), None)
                self._commands.send(message, newest)
        return None

    def metrics(self) -> Metrics:
        """All metrics of this process as they are now."""
        return Metrics(snapshot(self._registry))

    # Registry

    async def _follow(self, message: Published | Changed | FollowerStatus) -> None:
        match message:
            case Published():
                await self._publish(message)
            case Changed():
                self._registry_changed(message)
            case FollowerStatus():
                self._lookup.polled(message.polled_at)

    async def _publish(self, published: Published) -> None:
        # A follower that was started again lacks what it could not write: what was revoked stays revoked.
        is_older = published.sequence < self._sequence
        try:
            self._lookup.publish(Path(published.path), keep_overlay=is_older)
        except RegistryError as exc:
            raise ControlError(str(exc)) from exc
        self._contexts.keep((realm.hint, realm.record_bytes_max) for realm in self._lookup.realms.values())
        self._check_sessions(self._sessions, None)
        self._life.changed(time.time(), realms=True)
        for session in self._sessions:
            self._commands.connected(session)
        if not self._acceptors and not self._draining.is_set():
            self._accept()

    def _registry_changed(self, change: Changed) -> None:
        self._sequence = change.sequence
        self._lookup.replace_overlay(change.overlay)
        if not self._lookup.is_ready:  # the replica that lacks all this follows
            return
        if change.realms:
            self._lookup.reload_realms()
            self._contexts.keep(
                (realm.hint, realm.record_bytes_max) for realm in self._lookup.realms.values()
            )
        self._check_sessions(self._sessions.of_devices(change.devices), change.committed_at)
        self._life.changed(time.time(), realms=change.realms)
        self._commands.changed(change.devices, self._sessions.of_devices(change.devices))

    def _check_sessions(self, sessions: Iterable[DeviceConnection], committed_at: float | None) -> None:
        """Evaluate again what let these devices in, and stop those that would not come in now."""
        now = time.time()
        for session in sessions:
            if session.device_id == NEWCOMER:
                continue
            record = self._lookup.record(session.realm_id, session.identity.encode("utf-8"))
            if record is None or record.credential_id != session.credential_id:
                reason = "removed"
            elif (outcome := refusal(record, session.address, now)) is not Outcome.OK:
                reason = outcome.value
            else:
                self._life.file_end(session, record.not_after)
                continue
            session.stop(reason)
            if committed_at is not None:
                self._observe_revocation(max(0.0, time.time() - committed_at))

    def _end_session(self, message: EndSession) -> None:
        """A newer session of its device took its place, in whichever worker."""
        for session in self._sessions.of_devices([(message.device_id, message.device_id)]):
            if session.session_id == message.session and session.is_live:
                session.stop("replaced")
                self._observe_revocation(max(0.0, time.time() - message.since))

    # Accepting

    def _accept(self) -> None:
        """Begin to accept, each listener on this worker's own socket."""
        for listener in self._listeners:
            sock = self._sockets[listener.name][self._number]
            self._acceptors.append(Acceptor(self._poller, sock, BACKLOG, self._factory(listener)))
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again
        gc.set_threshold(*GC_THRESHOLDS)
        log.debug("accepting", worker=self._number)

    def _factory(self, listener: Listener) -> Callable[[], DeviceConnection]:
        services = self._services
        return lambda: DeviceConnection(listener, services)

    # Time

    def _tick(self) -> None:
        for connection in self._deadlines.expired(time.monotonic()):
            connection.deadline_passed()
            if connection.phase is not connection.phase.GONE:
                self._deadlines.add(connection)
        self._life.tick(time.time())
        self._connection_log.tick()
        if time.monotonic() >= self._keys_looked_at + _KEYS_EVERY_S:
            self._keys_looked_at = time.monotonic()
            refresh_keys(self._keys)
        self._loop.call_later(TICK_S, self._tick)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task_failed", exc_info=exc)

    # The end

    async def _drain(self) -> None:
        deadline = self._loop.time() + self._drain_s
        for acceptor in self._acceptors:
            acceptor.close()
        for socks in self._sockets.values():
            for sock in socks:
                sock.close()
        self._life.report()
        for connection in self._deadlines:
            connection.stop("the gateway stops", max(STOP_S, _SETTLE_SHARE * self._drain_s))
        while any(True for _ in self._deadlines) and self._loop.time() < deadline:  # noqa: ASYNC110 - thousands end at once
            await asyncio.sleep(TICK_S / 5)
        try:
            async with asyncio.timeout_at(max(deadline, self._loop.time() + 1)):
                await self._routes.close()
        except TimeoutError:
            log.warning("drain_incomplete", reason="a backend did not take everything in time")
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        self._poller.close()
        self._lookup.close()


async def _main(control_fd: int) -> None:
    """Wait for the configuration, serve, say good-bye with the last metrics."""
    channel = await Channel.over(socket.socket(fileno=control_fd))
    configuration = await channel.receive_first()
    assert isinstance(configuration, Configure)
    settings = WorkerSettings.model_validate_json(configuration.settings)
    setup(settings.log, process=process_name(configuration.worker))
    worker = Worker(
        settings, configuration.worker, configuration.workers, configuration.sockets, channel.notify
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, worker.drain, settings.drain_s)
    channel.handler = worker.handle
    serving = loop.create_task(channel.serve())
    serving.add_done_callback(lambda _: worker.drain(settings.drain_s))  # the supervisor is gone
    try:
        await worker.serve()
    finally:
        channel.notify(worker.metrics())
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await channel.finish()


def main() -> None:
    """Entry point of the process."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole terminal; the supervisor answers it
    run(_main(int(sys.argv[1])))


if __name__ == "__main__":
    main()
