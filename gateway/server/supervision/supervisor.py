"""The supervisor: binds the sockets, keeps the follower and the workers alive, answers operators and Prometheus.

It carries no device's bytes but commands on their way to one, and reads no registry, so that neither load nor a slow
database stops it. All listening sockets are bound here and lent to the workers: a worker that dies leaves its sockets, and
the connections waiting in them, to its successor.
"""

import asyncio
import contextlib
import os
import platform
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry

import gateway
from gateway.errors import ConfigurationError, ControlError, GatewayError
from gateway.registry.notices import Changed, Published
from gateway.server.control.channel import CONTROL_SOCKET, unix_listener
from gateway.server.control.messages import (
    CheckReaders,
    Collect,
    CommandDelivered,
    CommandOutcome,
    Configure,
    Drain,
    EndSession,
    FollowerStatus,
    Message,
    Newcomers,
    SendCommand,
    SessionClosed,
    SessionOpened,
    Used,
)
from gateway.server.control.trace_messages import KeyLogLine, TraceEvents
from gateway.server.processes.open_files import allow_open_files
from gateway.server.processes.sockets import ListeningSockets, bind_admin, lock_folder
from gateway.server.sessions.takeover import LimitedSession, LimitedSessions
from gateway.server.supervision.admin import Admin
from gateway.server.supervision.changes import Changes
from gateway.server.supervision.children import Child
from gateway.server.supervision.crew import AFTER_DRAIN_S, Crew
from gateway.server.supervision.dispatch import CommandDispatch
from gateway.server.supervision.node import SupervisorSettings, compare
from gateway.server.supervision.notify import ServiceManager
from gateway.server.supervision.operators import Operators
from gateway.server.supervision.trace_relay import TraceRelay
from gateway.server.supervision.upgrade import FORMAT, Handover, Program, become, unblock_signals
from gateway.server.supervision.watch import keep_informed, keep_watchdog
from gateway.telemetry import logs
from gateway.telemetry.aggregate import Snapshot, merge, retire, snapshot
from gateway.telemetry.metrics import SupervisorMetrics
from gateway.tls.openssl import library_version

__all__ = ["Supervisor"]

log = structlog.get_logger()

_ROLL_PATIENCE_S: Final = 60.0
"""How long new workers may take to accept before a reload is given up."""
_UNSENT_MAX: Final = 10_000
"""What workers report while the follower is being started again."""


class Supervisor:
    """All of one node. `run` is its life.

    Args:
        settings: the configuration to begin with.
        program: this program, for upgrades.
        load: reads the configuration anew, as at the start.
        handover: what the image of this program before has left, if there was one.

    """

    def __init__(
        self,
        settings: SupervisorSettings,
        program: Program,
        load: Callable[[], SupervisorSettings],
        handover: Handover | None = None,
    ) -> None:
        self._settings = settings
        self._program = program
        self._load = load
        self._handover = handover
        self._metrics_registry = CollectorRegistry()
        self._metrics = metrics = SupervisorMetrics(
            self._metrics_registry,
            version=gateway.__version__,
            python=platform.python_version(),
            openssl=library_version(),
        )
        self._sockets = (
            ListeningSockets() if handover is None else ListeningSockets.handed(handover.listeners)
        )
        self._traces = TraceRelay(lambda: self._crew.everyone, allow_key_log=settings.admin.allow_key_log)
        self._admin_sock: socket.socket
        self._admin: Admin
        self._draining = ""
        self._manager = ServiceManager()
        self._changes = Changes(
            program,
            load=load,
            settings=lambda: self._settings,
            apply=self._apply,
            replace=self._replace,
            status=self._describe,
            manager=self._manager,
            metrics=metrics,
        )
        self._crew = Crew(
            self._sockets,
            self._from_worker,
            self._traces.worker_started,
            self._worker_ended,
            self._spawn,
        )
        self._follower = self._new_follower()
        self._unsent: deque[Message] = deque(maxlen=_UNSENT_MAX)
        self._commands = CommandDispatch(self._crew.ask, lambda state: metrics.commands.labels(state).inc())
        self._operators = Operators(
            self._crew, self._commands, self._traces, self._drain_node, lambda: bool(self._draining)
        )
        self._status = self._crew.status
        self._limited = LimitedSessions()
        self._changing = asyncio.Lock()
        """held while the configuration or the program changes"""
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, then drain. Raises GatewayError when it cannot start, with nothing changed."""
        handover = self._handover
        async with contextlib.AsyncExitStack() as stack:
            self._lock = stack.enter_context(
                lock_folder(self._settings.data_dir, None if handover is None else handover.lock)
            )
            stack.callback(self._sockets.close)
            change = self._sockets.bind(self._settings.worker.listeners, self._settings.worker_count)
            change.apply()
            change.finish()
            await self._open_admin_at_start(handover)
            stack.push_async_callback(lambda: self._close_endpoint(self._admin_sock, self._admin))
            self._control = (
                unix_listener(self._settings.data_dir / CONTROL_SOCKET)
                if handover is None
                else socket.socket(fileno=handover.control)
            )
            await self._operators.open(self._control)
            stack.callback(self._operators.close)
            worker = self._settings.worker
            allow_open_files(worker.limits, worker.routes, self._settings.worker_count)
            self._log_start()
            await self._keep_children()

    async def collect(self) -> Snapshot:
        """The metrics of all processes, summed."""
        await asyncio.gather(self._follower.collect(Collect()), self._crew.collect())
        states = Counter(worker.state for worker in self._crew.workers)
        for state in ("ready", "starting", "silent"):
            self._metrics.workers.labels(state).set(states[state])
        return merge([snapshot(self._metrics_registry), self._follower.collected, *self._crew.collected])

    # Readiness, for the admin endpoint and the service manager

    @property
    def problems(self) -> list[str]:
        """Why devices cannot connect."""
        if self._draining:
            return [self._draining]
        if not any(worker.is_ready for worker in self._crew.everyone):
            if not self._crew.has_replica:
                return [f"the registry was never copied to this node: {self._status.detail}"]
            return ["no worker accepts devices yet"]
        max_staleness_s = self._settings.worker.max_staleness_s
        if max_staleness_s and time.time() - self._status.polled_at > max_staleness_s:
            return [f"the registry was not read for registry.max_staleness_s: {self._status.detail}"]
        return []

    @property
    def degradations(self) -> list[str]:
        """What is not well."""
        found = []
        if self._status.state != "following":
            found.append(self._status.detail)
        if self._crew.overlay is not None:
            found.append("the replica cannot be written and is kept in memory: is the disk full?")
        lost = [worker.name for worker in self._crew.workers if not worker.is_ready]
        if lost:
            found.append(f"not accepting: {', '.join(lost)}")
        return found

    def _is_ready(self) -> bool:
        return not self.problems and not self._changing.locked()

    def _describe(self) -> str:
        ready = sum(worker.is_ready for worker in self._crew.workers)
        parts = self.problems or [f"{ready} workers accept devices", *filter(None, self.degradations)]
        if self._crew.leaving:
            parts.append(f"{len(self._crew.leaving)} old workers end their sessions")
        return "; ".join([*([self._changes.trouble] if self._changes.trouble else []), *parts])

    # Children

    async def _keep_children(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._changes.ask, "reload")
        loop.add_signal_handler(signal.SIGUSR2, self._changes.ask, "upgrade")
        unblock_signals()
        async with asyncio.TaskGroup() as tasks:
            self._children = tasks
            if self._handover is None:
                self._crew.start(self._settings, tasks)
                tasks.create_task(self._follower.keep())
            else:
                tasks.create_task(self._take_over(self._handover))
            informing = [
                loop.create_task(keep_informed(self._manager, self._is_ready, self._describe)),
                loop.create_task(keep_watchdog(self._manager, lambda: self._crew.is_alive)),
                loop.create_task(self._crew.siblings.watch()),
                loop.create_task(self._changes.run()),
            ]
            await self._stop.wait()
            for task in informing:
                task.cancel()
            await asyncio.wait(informing)
            self._manager.stopping()
            await self._drain()

    async def _drain(self) -> None:
        self._draining = "the gateway is stopping"
        drain_s = self._settings.drain_s
        log.info("stopping", drain_s=drain_s)
        self._sockets.close()
        await self._crew.stop(drain_s)
        await self._follower.stop(Drain(drain_s), AFTER_DRAIN_S)
        log.info("stopped")

    async def _drain_node(self, within_s: float) -> None:
        """Let this node run empty. It stays, not ready, until it is told to end."""
        async with self._changing:
            if not self._draining:
                self._draining = "the node is drained"
                log.info("draining", within_s=within_s)
            await self._crew.empty(within_s)
            self._sockets.close()

    def _new_follower(self) -> Child:
        return Child(
            "follower",
            "gateway.server.processes.follower",
            lambda _: Configure(self._settings.follower.to_json()),
            self._from_follower,
            started=self._follower_started,
            ended=self._follower_ended,
        )

    def _follower_started(self, follower: Child) -> None:
        while self._unsent:
            follower.notify(self._unsent.popleft())

    def _follower_ended(self, by_itself: bool) -> None:
        if by_itself:
            self._metrics.restarts.labels("follower").inc()

    def _tell_follower(self, message: Message) -> None:
        if self._follower.takes_reports:
            self._follower.notify(message)
        else:
            self._unsent.append(message)

    async def _replace_follower(self) -> None:
        """One after the other: there is one writer of the replica. Workers read it meanwhile."""
        old = self._follower
        await old.stop(Drain(0), AFTER_DRAIN_S)
        await old.gone.wait()
        self._crew.departed = retire(self._crew.departed, old.departed)
        self._follower = self._new_follower()
        self._children.create_task(self._follower.keep())

    def _worker_ended(self, name: str, by_itself: bool) -> None:
        if by_itself:
            self._metrics.restarts.labels("worker").inc()
        self._limited.worker_ended(name)
        self._tell_follower(CheckReaders())

    async def _from_worker(self, name: str, message: Message) -> Message | None:
        match message:
            case CommandOutcome():
                self._commands.settle(message)
            case CommandDelivered():
                self._command_delivered(message)
            case TraceEvents() | KeyLogLine():
                self._traces.told(message)
            case SendCommand():
                self._spawn(self._send_command(message))
            case Used() | Newcomers():
                self._tell_follower(message)
            case SessionOpened():
                new = LimitedSession(message.since, message.session, name)
                for surplus in self._limited.opened(message.device_id, new, message.limit):
                    end = EndSession(message.device_id, surplus.session, message.since)
                    worker = self._crew.named(surplus.worker)
                    if worker is not None:
                        worker.notify(end)
            case SessionClosed():
                self._limited.closed(message.device_id, message.session)
            case _:
                raise AssertionError(f"a worker does not say {type(message).__name__}")
        return None

    async def _send_command(self, command: SendCommand) -> None:
        """One that came from a broker: nobody waits for its outcome but the metric and the log."""
        try:
            outcome = await self._commands.send(command)
        except ControlError as exc:
            log.warning("command_failed", device=command.device, realm=command.realm, reason=str(exc))
            return
        log.debug("command_sent", device=command.device, realm=command.realm, state=outcome.state)

    def _command_delivered(self, message: CommandDelivered) -> None:
        """The registry forgets it through the follower; until then every worker knows."""
        self._tell_follower(message)
        self._crew.notify(message)

    async def _from_follower(self, message: Message) -> Message | None:
        match message:
            case Published():
                log.info("replica_published", sequence=message.sequence)
                self._crew.published(message)
            case Changed():
                self._crew.changed(message)
            case FollowerStatus():
                self._status = message
                self._crew.status_changed(message)
            case CommandDelivered():  # what one that ends leaves to its successor
                self._unsent.append(message)
            case _:
                raise AssertionError(f"a follower does not say {type(message).__name__}")
        return None

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Another configuration, another program

    async def _apply(self, settings: SupervisorSettings) -> None:
        """Put other settings in force. Raises GatewayError when they cannot be: then nothing has changed."""
        async with self._changing:
            self._refuse_when_draining()
            change = compare(self._settings, settings)
            sockets = self._sockets.bind(settings.worker.listeners, settings.worker_count)
            endpoint: tuple[socket.socket, Admin] | None = None
            try:
                if change.reopens_admin:
                    endpoint = await self._open_admin(settings, rebind=change.rebinds_admin)
                await self._apply_to_workers(settings, sockets.apply(), rolls=change.rolls_workers)
            except GatewayError:
                sockets.undo()
                if endpoint is not None:
                    await self._close_endpoint(*endpoint)
                raise
            sockets.finish()
            self._settings = settings
            if endpoint is not None:
                before, (self._admin_sock, self._admin) = (self._admin_sock, self._admin), endpoint
                await self._close_endpoint(*before)
            self._traces.change(allow_key_log=settings.admin.allow_key_log)
            if change.restarts_follower:
                await self._replace_follower()
            logs.change(settings.worker.log)
            worker = self._settings.worker
            allow_open_files(worker.limits, worker.routes, self._settings.worker_count)
            self._log_listeners()

    async def _apply_to_workers(
        self, settings: SupervisorSettings, rebound: set[str], *, rolls: bool
    ) -> None:
        if not rolls:
            await self._crew.reconfigure(settings, rebound)
        elif not await self._crew.roll(settings, _ROLL_PATIENCE_S):
            raise ConfigurationError(
                f"the new workers did not accept devices within {_ROLL_PATIENCE_S:g} s: see the log before this line"
            )

    async def _replace(self) -> OSError:
        """Let the program on the disk go on in this process; returns only when that is not to be."""
        async with self._changing:
            self._refuse_when_draining()
            await self._admin.close()
            self._operators.close()
            children = [*self._crew.everyone, self._follower]
            handed = {child: each for child in children if (each := await child.hand_over()) is not None}
            own = [
                family
                for family in snapshot(self._metrics_registry)
                if not family.name.startswith("process_")
            ]
            handover = Handover(
                format=FORMAT,
                version=gateway.__version__,
                lock=self._lock,
                control=self._control.fileno(),
                admin=self._admin_sock.fileno(),
                admin_bind=str(self._settings.admin.bind),
                listeners=self._sockets.hand_over(),
                workers=[each for child, each in handed.items() if child is not self._follower],
                follower=handed.get(self._follower),
                departed=retire(self._crew.departed, own),
                limited=self._limited.dump(),
                overlay=self._crew.overlay,
                status=self._status,
                generation=self._crew.generation,
                unsent=list(self._unsent),
            )
            try:
                become(self._program, handover)
            except OSError as exc:
                for child in handed:
                    await child.take_back()
                self._admin_sock, self._admin = await self._open_admin(self._settings, rebind=False)
                await self._operators.open(self._control)
                return exc

    async def _take_over(self, handover: Handover) -> None:
        """Go on with what the image of the program before has left: its children give way to new ones."""
        async with self._changing:
            self._crew.departed, self._crew.overlay = handover.departed, handover.overlay
            self._crew.generation = handover.generation
            self._status = self._crew.status = handover.status
            self._limited.restore(handover.limited)
            self._unsent.extend(handover.unsent)
            await self._crew.attend(handover.workers, self._children)
            if handover.follower is not None:
                await self._follower.adopt(handover.follower)
                self._children.create_task(self._follower.keep())
                await self._replace_follower()
            else:
                self._children.create_task(self._follower.keep())
            await self._crew.roll(self._settings, None)
            self._metrics.upgrades.labels("done").inc()
            log.info("upgraded", version=gateway.__version__, before=handover.version)

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise ConfigurationError(f"{self._draining}: restart it instead")

    # The admin endpoint

    async def _open_admin_at_start(self, handover: Handover | None) -> None:
        rebind = True
        if handover is not None:
            self._admin_sock = socket.socket(fileno=handover.admin)
            rebind = handover.admin_bind != str(self._settings.admin.bind)
        self._admin_sock, self._admin = await self._open_admin(self._settings, rebind=rebind)

    async def _open_admin(self, settings: SupervisorSettings, *, rebind: bool) -> tuple[socket.socket, Admin]:
        """Serve with these settings, on the socket that there is or on another one."""
        sock = bind_admin(settings.admin.bind) if rebind else self._admin_sock.dup()
        admin = Admin(settings.admin, self, self.collect)
        try:
            address = await admin.open(sock)
        except BaseException:
            sock.close()
            raise
        log.info("admin_listening", address=address)
        return sock, admin

    async def _close_endpoint(self, sock: socket.socket, admin: Admin) -> None:
        await admin.close()
        sock.close()

    # At the start

    def _log_listeners(self) -> None:
        for name, address in self._sockets.addresses.items():
            log.info("listening", listener=name, address=address)

    def _log_start(self) -> None:
        self._log_listeners()
        log.info("started", node=self._settings.name, workers=self._settings.worker_count, pid=os.getpid())
