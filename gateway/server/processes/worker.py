"""A worker process: accepts devices and serves them until it is told to drain, or until the supervisor is gone.

Started by the supervisor as `python -m gateway.server.processes.worker CONTROL SOCKETS`, two descriptors: of its end of the
control channel, whose first message configures it, and of the socket over which listening sockets come. It owns its
listeners, look-up, routes and sessions, and touches nothing that another process owns: it reads the replica, and never the
registry.
"""

import asyncio
import dataclasses
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, TypeVar

import structlog
from prometheus_client import CollectorRegistry

from gateway.errors import ControlError
from gateway.forward.route import RouteTable
from gateway.net.loop import freeze
from gateway.net.poller import Poller
from gateway.registry.masterkeys import KeyRing
from gateway.registry.notices import Changed, Published
from gateway.server.admission.failures import FailedHandshakes
from gateway.server.admission.limits import ConnectionLimits
from gateway.server.admission.listener import Listener
from gateway.server.admission.lookup import DeviceLookup
from gateway.server.connections.connection import DeviceConnection
from gateway.server.connections.deadlines import TICK_S, Deadlines
from gateway.server.connections.draining import end_all, end_spread
from gateway.server.connections.ending import EndingConnection
from gateway.server.connections.life import SessionLife
from gateway.server.connections.proxied import ProxiedConnection
from gateway.server.connections.registry_changes import RegistryChanges
from gateway.server.connections.services import Services
from gateway.server.connections.tracing import Tracers
from gateway.server.control.channel import Answer
from gateway.server.control.messages import (
    Alive,
    Collect,
    CommandDelivered,
    CountLoad,
    DiscardDeadLetters,
    Done,
    Drain,
    EndSession,
    EndSessions,
    FollowerStatus,
    Kick,
    ListDeadLetters,
    ListSessions,
    Load,
    Message,
    Metrics,
    Reconfigure,
    RetryDeadLetters,
    SendCommand,
    Sessions,
    StandDown,
    StandIn,
    StopAccepting,
    Subscribe,
)
from gateway.server.control.trace_messages import StartTrace, StopTrace
from gateway.server.processes.accepting import Accepting, receive_descriptors
from gateway.server.processes.child import configured, live, run_child
from gateway.server.processes.keys import refresh_keys
from gateway.server.processes.open_files import connections_with_files
from gateway.server.processes.worker_settings import WorkerSettings
from gateway.server.sessions.command_sources import CommandSources
from gateway.server.sessions.commands import CommandSender
from gateway.server.sessions.dead_letters import handle_dead_letters
from gateway.server.sessions.index import SessionIndex
from gateway.server.sessions.routes import LiveRoute, LiveRoutes, RouteSurroundings
from gateway.server.settings import ListenerSettings
from gateway.telemetry.aggregate import snapshot
from gateway.telemetry.connection_log import ConnectionLog
from gateway.telemetry.logs import change, setup
from gateway.telemetry.metrics import WorkerMetrics
from gateway.tls.contexts import ContextStore

__all__ = ["Worker"]

T = TypeVar("T")

log = structlog.get_logger()

_KEYS_EVERY_S: Final = 2.0
"""How often the file with the master keys is looked at: one more key may be there."""
_RETIRE_EVERY_S: Final = 0.5
"""How often a route that is not in the configuration any more is asked whether its last session has ended."""
_STOPS: Final = "the gateway stops"


class Worker:
    """All of one worker. `serve` is its life."""

    def __init__(
        self,
        settings: WorkerSettings,
        name: str,
        workers: int,
        descriptors: socket.socket,
        tell: Callable[[Message], None],
    ) -> None:
        self._settings = settings
        self._name = name
        self._descriptors = descriptors
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._registry = CollectorRegistry()
        self._metrics = metrics = WorkerMetrics(self._registry)
        self._observe_revocation = metrics.revocation.observe
        self._keys = KeyRing(settings.master_keys)
        self._lookup = DeviceLookup(self._keys.sealer, metrics, max_staleness_s=settings.max_staleness_s)
        self._contexts = ContextStore()
        self._routes = LiveRoutes(
            RouteTable(settings.routes, settings.backends),
            RouteSurroundings(
                metrics,
                self._spawn,
                self._loop.call_soon,
                workers,
                spool_dir=settings.data_dir / "spool",
                stdout_lock=settings.data_dir / "stdout.lock",
            ),
            message_bytes_max=settings.limits.message_bytes_max,
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
        self._life = SessionLife(
            self._sessions,
            self._lookup,
            settings.limits.sessions_per_device,
            tell,
            self._observe_revocation,
        )
        self._registry_changes = RegistryChanges(
            lookup=self._lookup,
            contexts=self._contexts,
            sessions=self._sessions,
            life=self._life,
            commands=self._commands,
            observe_revocation=self._observe_revocation,
        )
        self._deadlines: Deadlines[EndingConnection | ProxiedConnection] = Deadlines(time.monotonic())
        self._tracers = Tracers(tell, self._lookup, settings.limits, settings.listeners, time.time)
        self._limits: ConnectionLimits[DeviceConnection] = ConnectionLimits(
            settings.limits, workers, connections_with_files(settings.routes)
        )
        self._failures = FailedHandshakes(settings.limits, workers)
        self._connection_log = ConnectionLog(settings.log, name, sys.stderr.buffer, time.monotonic)
        self._services = Services(
            settings=settings.limits,
            now=time.monotonic,  # uvloop's own clock stands still within a turn of the loop
            wall=time.time,
            later=self._loop.call_later,
            limits=self._limits,
            failures=self._failures,
            deadlines=self._deadlines,
            lookup=self._lookup,
            routes=self._routes,
            life=self._life,
            commands=self._commands,
            is_debugging=settings.log.level == "debug",
            connection_log=self._connection_log,
            tracers=self._tracers,
            process=name,
        )
        self._listeners = {each.name: self._listener(each) for each in settings.listeners}
        self._poller = Poller(self._loop)
        self._accepting = Accepting(self._poller, self._factory)
        self._subscription: asyncio.Task[None] | None = None
        self._keys_looked_at = time.monotonic()
        self._draining = asyncio.Event()
        self._drain_order = Drain(settings.drain_s)

    async def serve(self) -> None:
        """Serve until `drain` is called, then end every session and return."""
        await self._routes.open()
        self._tick()
        await self._draining.wait()
        await self._drain()

    def drain(self, order: Drain) -> None:
        """Stop accepting and let `serve` return in the time that was given."""
        self._drain_order = order
        self._draining.set()

    def take_sockets(self, counts: dict[str, int], of_worker: str = "") -> None:
        """Take the listening sockets that the supervisor has sent, so many for each listener; our own, or another's."""
        self._accepting.take(receive_descriptors(self._descriptors, counts), of_worker)

    async def handle(self, message: Message) -> Answer:
        """What the supervisor says."""
        match message:
            case Published() | Changed() | FollowerStatus():
                self._follow(message)
            case Collect():
                return self.metrics()
            case ListSessions() | Kick() | SendCommand():
                return self._about_sessions(message)
            case CommandDelivered():
                self._commands.settled(message.device_id, message.number)
            case ListDeadLetters() | RetryDeadLetters() | DiscardDeadLetters():
                return self._spawn(handle_dead_letters(self._routes, message))  # a gigabyte takes a while
            case StartTrace() | StopTrace():
                self._tracers.handle(message)
            case EndSession():
                self._end_session(message)
            case _:
                return await self._obey(message)
        return None

    async def _obey(self, message: Message) -> Message | None:
        """What concerns the life of this worker."""
        match message:
            case Reconfigure():
                return Done(self._reconfigure(message))
            case Subscribe():
                self._subscribe()
            case CountLoad():
                return self._load()
            case StopAccepting():
                self._stop_accepting()
            case EndSessions():
                self._stop_accepting()
                self._spawn(end_spread(self._deadlines, message.within_s, "the node is drained"))
            case StandIn():
                self.take_sockets(message.sockets, message.worker)
                self._accepting.start(self._listeners.values())
            case StandDown():
                self._accepting.let_go(message.worker)
            case Drain():
                self.drain(message)
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
        self._metrics.tasks.set(len(asyncio.all_tasks(self._loop)))
        return Metrics(snapshot(self._registry))

    # Registry

    def _follow(self, message: Published | Changed | FollowerStatus) -> None:
        match message:
            case Published():
                self._registry_changes.published(message)
                if not self._accepting.is_accepting:
                    self._accept()
            case Changed():
                self._registry_changes.changed(message)
            case FollowerStatus():
                self._lookup.polled(message.polled_at)

    def _end_session(self, message: EndSession) -> None:
        """A newer session of its device took its place, in whichever worker."""
        for session in self._sessions.of_devices([(message.device_id, message.device_id)]):
            if session.session_id == message.session and session.is_live:
                session.stop("replaced")
                self._observe_revocation(max(0.0, time.time() - message.since))

    # Accepting

    def _accept(self) -> None:
        """Begin to accept, each listener on this worker's own sockets."""
        self._accepting.start(self._listeners.values())
        freeze()
        log.debug("accepting")

    def _stop_accepting(self) -> None:
        if self._subscription is not None:
            self._subscription.cancel()
            self._subscription = None
        self._accepting.stop()

    def _factory(self, listener: Listener) -> Callable[[], DeviceConnection | ProxiedConnection]:
        def make() -> DeviceConnection | ProxiedConnection:
            if listener.balancers:
                return ProxiedConnection(listener, self._services)
            return DeviceConnection(listener, self._services)

        return make

    def _listener(self, settings: ListenerSettings) -> Listener:
        return Listener(settings, self._routes.alpn, self._lookup, self._contexts, self._metrics)

    # Configuration

    def _reconfigure(self, message: Reconfigure) -> int:
        """Put other settings in force for what comes from now on; how many sessions had to end.

        A live session keeps what it began with, and ends when its listener, its route or its backend is not there any more.
        """
        before, settings = self._settings, WorkerSettings.model_validate_json(message.settings)
        self._settings = settings
        if settings.log != before.log:
            change(settings.log, self._name)
            self._connection_log = ConnectionLog(settings.log, self._name, sys.stderr.buffer, time.monotonic)
        self.take_sockets(message.sockets)
        table = RouteTable(settings.routes, settings.backends)
        retired = self._routes.change(table, settings.backends, settings.limits.message_bytes_max)
        self._limits.change(settings.limits, connections_with_files(settings.routes))
        self._failures.change(settings.limits)
        self._tracers.change(settings.limits, settings.listeners)
        self._life.limit_changed(settings.limits.sessions_per_device)
        self._services = dataclasses.replace(
            self._services,
            settings=settings.limits,
            is_debugging=settings.log.level == "debug",
            connection_log=self._connection_log,
        )
        for connection in self._deadlines:
            connection.configuration_changed(self._services)
        ended = self._change_listeners(settings.listeners)
        gone = [each.route for each in retired if each.is_gone]
        ended += self._end(lambda session: session.live_route in gone, "route removed")
        for each in retired:
            self._spawn(self._retire(each.route))
        if self._accepting.is_accepting:
            self._accepting.start(self._listeners.values())
        if self._subscription is not None and _what_brokers_send(before) != _what_brokers_send(settings):
            self._subscribe()
        return ended

    def _change_listeners(self, listeners: Iterable[ListenerSettings]) -> int:
        """Make, change and remove listeners; how many sessions had to end."""
        wanted = {each.name: each for each in listeners}
        gone = {name: self._listeners.pop(name) for name in set(self._listeners) - set(wanted)}
        for name in gone:
            self._accepting.drop(name)
        for name, settings in wanted.items():
            if name in self._listeners:
                self._listeners[name].change(settings, self._routes.alpn)
            else:
                self._listeners[name] = self._listener(settings)
        return self._end(lambda each: each.listener in gone.values(), "listener removed")

    @property
    def _connections(self) -> "list[DeviceConnection]":
        return [each for each in self._deadlines if isinstance(each, DeviceConnection)]

    def _end(self, is_meant: Callable[[DeviceConnection], bool], reason: str) -> int:
        found = [each for each in self._connections if is_meant(each)]
        for connection in found:
            connection.stop(reason)
        return len(found)

    async def _retire(self, route: LiveRoute) -> None:
        while any(session.live_route is route for session in self._sessions):  # noqa: ASYNC110 - may take days
            await asyncio.sleep(_RETIRE_EVERY_S)
        await self._routes.retire(route)

    def _subscribe(self) -> None:
        """Listen for what brokers send to devices, in place of a subscription that there is."""
        if self._subscription is not None:
            self._subscription.cancel()
        sources = CommandSources(
            self._settings.backends,
            self._tell,
            payload_bytes_max=self._settings.limits.message_bytes_max,
            wall=time.time,
        )
        self._subscription = self._spawn(sources.run())

    def _load(self) -> Load:
        connections = sum(1 for _ in self._deadlines)
        return Load(connections, len(self._sessions), self._routes.waiting_messages)

    # Time

    def _tick(self) -> None:
        self._tell(Alive())
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

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        exc = task.exception()
        if exc is not None and not isinstance(exc, ControlError):  # that one is for who has asked
            log.error("task_failed", exc_info=exc)

    # The end

    async def _drain(self) -> None:
        order = self._drain_order
        deadline = self._loop.time() + order.drain_s
        self._stop_accepting()
        self._life.report()
        await (end_spread if order.is_spread else end_all)(self._deadlines, order.drain_s, _STOPS)
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


def _what_brokers_send(settings: WorkerSettings) -> tuple[object, ...]:
    """What a subscription depends on."""
    return settings.backends, settings.limits.message_bytes_max


async def _main(control_fd: int, descriptors_fd: int) -> None:
    channel, configuration = await configured(control_fd)
    settings = WorkerSettings.model_validate_json(configuration.settings)
    setup(settings.log, process=configuration.name)
    descriptors = socket.socket(fileno=descriptors_fd)
    worker = Worker(settings, configuration.name, configuration.workers, descriptors, channel.notify)
    worker.take_sockets(configuration.sockets)
    await live(
        worker.serve(),
        channel,
        worker.handle,
        lambda: worker.drain(Drain(settings.drain_s)),
        worker.metrics,
    )


if __name__ == "__main__":
    run_child(_main(int(sys.argv[1]), int(sys.argv[2])))
