"""The supervisor: binds the sockets, keeps the follower and the workers alive, answers operators and Prometheus.

It carries no device's bytes but commands on their way to one, and reads no registry, so that neither load nor a slow
database stops it. All listening sockets are bound here, one per worker and listener (SO_REUSEPORT spreads connections
over them), and inherited by every worker: a worker that dies leaves its socket, and the connections waiting in it, to
its successor.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import os
import platform
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import structlog
from prometheus_client import CollectorRegistry

import gateway
from gateway.errors import ConfigurationError, ControlError
from gateway.forward.secrets import REVEAL
from gateway.registry.notices import Changed, Published
from gateway.server.admin import Admin
from gateway.server.admin_settings import AdminSettings
from gateway.server.children import Child
from gateway.server.control import (
    Channel,
    CheckReaders,
    Collect,
    CommandDelivered,
    CommandOutcome,
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
    Newcomers,
    RetryDeadLetters,
    SendCommand,
    SessionClosed,
    SessionOpened,
    Sessions,
    Used,
    unix_listener,
)
from gateway.server.dead_letters import add_up
from gateway.server.dispatch import CommandDispatch
from gateway.server.follower import FollowerSettings
from gateway.server.settings import Address
from gateway.server.takeover import LimitedSession, LimitedSessions
from gateway.server.trace_messages import KeyLogLine, StartTrace, TraceEvents
from gateway.server.trace_relay import TraceRelay
from gateway.server.worker import BACKLOG, WorkerSettings
from gateway.telemetry.aggregate import Snapshot, merge, snapshot
from gateway.telemetry.metrics import SupervisorMetrics
from gateway.tls.openssl import library_version

__all__ = ["CONTROL_SOCKET", "Supervisor", "SupervisorSettings", "open_files_needed"]

log = structlog.get_logger()

CONTROL_SOCKET: Final = "control.sock"
_ASK_TIMEOUT_S: Final = 5.0
_DEAD_LETTERS_TIMEOUT_S: Final = 50.0
"""Writing back a gigabyte takes a while."""
_PUBLISH_TIMEOUT_S: Final = 30.0
"""From a cold page cache, with every live session to look at again."""
_AFTER_DRAIN_S: Final = 5.0
"""What a child may take beyond its drain window before it is killed."""
_OTHER_FILES: Final = 128
"""What a worker opens beside connections: listeners, replica, backends, its control channel."""
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A device that lost power is found after two minutes. Inherited by accepted sockets."""


@dataclasses.dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """What the supervisor needs, and what it hands to its children."""

    name: str
    workers: int
    data_dir: Path
    drain_s: float
    admin: AdminSettings
    worker: WorkerSettings
    follower: FollowerSettings


class Supervisor:
    """All of one node. `run` is its life."""

    def __init__(self, settings: SupervisorSettings) -> None:
        self._settings = settings
        self._metrics_registry = CollectorRegistry()
        self._metrics = metrics = SupervisorMetrics(
            self._metrics_registry,
            version=gateway.__version__,
            python=platform.python_version(),
            openssl=library_version(),
        )
        self._worker_count = settings.workers or os.cpu_count() or 1
        self._sockets: dict[str, list[socket.socket]] = {}
        self._follower = Child(
            "follower",
            "gateway.server.follower",
            self._configure_follower,
            self._from_follower,
            ended=metrics.restarts.labels("follower").inc,
        )
        self._workers: list[Child] = []
        self._commands = CommandDispatch(
            lambda: self._workers, lambda state: metrics.commands.labels(state).inc()
        )
        self._status = FollowerStatus(
            state="starting", detail="the follower is starting", sequence=0, polled_at=0.0
        )
        self._generation: Published | None = None
        self._overlay: Changed | None = None
        self._limited = LimitedSessions()
        self._traces = TraceRelay(lambda: self._workers, allow_key_log=settings.admin.allow_key_log)
        self._draining = False
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, then drain. Raises GatewayError when it cannot start, with nothing changed."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_locked(self._settings.data_dir))
            for listener in self._settings.worker.listeners:
                self._sockets[listener.name] = stack.enter_context(
                    _listening(f"listeners.{listener.name}.bind", listener.bind, self._worker_count)
                )
            admin = Admin(self._settings.admin, self, self.collect)
            admin_address = await admin.open()
            stack.push_async_callback(admin.close)
            control = await asyncio.start_unix_server(
                self._control_client, sock=unix_listener(self._settings.data_dir / CONTROL_SOCKET)
            )
            stack.callback(control.close)
            _allow_open_files(self._settings.worker.limits.connections, self._worker_count)
            self._log_start(admin_address)
            await self._keep_children()

    async def collect(self) -> Snapshot:
        """The metrics of all processes, summed."""
        families = await asyncio.gather(
            *(child.collect(Collect()) for child in [self._follower, *self._workers])
        )
        states = Counter(worker.state for worker in self._workers)
        for state in ("ready", "starting", "silent"):
            self._metrics.workers.labels(state).set(states[state])
        return merge([snapshot(self._metrics_registry), *families])

    # Readiness, for the admin endpoint

    @property
    def problems(self) -> list[str]:
        """Why devices cannot connect."""
        if self._draining:
            return ["the gateway is stopping"]
        if self._generation is None:
            return [f"the registry was never copied to this node: {self._status.detail}"]
        if not any(worker.is_ready for worker in self._workers):
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
        if self._overlay is not None:
            found.append("the replica cannot be written and is kept in memory: is the disk full?")
        lost = [worker.name for worker in self._workers if not worker.is_ready]
        if lost:
            found.append(f"not accepting: {', '.join(lost)}")
        return found

    # Children

    async def _keep_children(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        inherited = [sock.fileno() for socks in self._sockets.values() for sock in socks]
        self._workers = [
            Child(
                f"worker-{number}",
                "gateway.server.worker",
                self._worker_configuration(number),
                functools.partial(self._from_worker, f"worker-{number}"),
                started=self._worker_started,
                ended=functools.partial(self._worker_ended, f"worker-{number}"),
                inherited=inherited,
            )
            for number in range(self._worker_count)
        ]
        async with asyncio.TaskGroup() as tasks:
            for child in [self._follower, *self._workers]:
                tasks.create_task(child.keep())
            await self._stop.wait()
            await self._drain()

    async def _drain(self) -> None:
        self._draining = True
        drain_s = self._settings.drain_s
        log.info("stopping", drain_s=drain_s)
        for sock in self._all_sockets():
            sock.close()
        message = Drain(drain_s)
        await asyncio.gather(*(worker.stop(message, drain_s + _AFTER_DRAIN_S) for worker in self._workers))
        await self._follower.stop(message, _AFTER_DRAIN_S)
        log.info("stopped")

    def _all_sockets(self) -> Iterable[socket.socket]:
        return (sock for socks in self._sockets.values() for sock in socks)

    def _configure_follower(self) -> Configure:
        return Configure(self._settings.follower.to_json())

    def _worker_configuration(self, number: int) -> Callable[[], Configure]:
        sockets = {name: [sock.fileno() for sock in socks] for name, socks in self._sockets.items()}
        settings = self._settings.worker.model_dump_json(context=REVEAL).encode()
        return lambda: Configure(settings, number, self._worker_count, sockets)

    def _worker_started(self, worker: Child) -> None:
        """A worker begins empty: tell it where the replica is, when there is one, and what is traced."""
        self._traces.worker_started(worker)
        if self._generation is not None:
            self._spawn(self._publish_to(worker, self._generation))

    async def _publish_to(self, worker: Child, generation: Published) -> None:
        """Let a worker read this generation; from then on it accepts."""
        worker.notify(self._status)
        if self._overlay is not None:  # before it accepts anybody
            worker.notify(self._overlay)
        try:
            await worker.call(generation, _PUBLISH_TIMEOUT_S)
        except ControlError as exc:
            log.warning("worker_not_ready", child=worker.name, reason=str(exc))
            return
        worker.is_ready = True

    def _worker_ended(self, name: str) -> None:
        self._metrics.restarts.labels("worker").inc()
        self._limited.worker_ended(name)
        self._follower.notify(CheckReaders())

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
                self._follower.notify(message)
            case SessionOpened():
                new = LimitedSession(message.since, message.session, name)
                for surplus in self._limited.opened(message.device_id, new, message.limit):
                    end = EndSession(message.device_id, surplus.session, message.since)
                    self._worker(surplus.worker).notify(end)
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
        self._follower.notify(message)
        for worker in self._workers:
            worker.notify(message)

    def _worker(self, name: str) -> Child:
        return next(worker for worker in self._workers if worker.name == name)

    async def _from_follower(self, message: Message) -> Message | None:
        match message:
            case Published():
                self._generation = message
                if self._overlay is not None and self._overlay.sequence <= message.sequence:
                    self._overlay = None  # else a follower was started again, and its replica lacks all this
                log.info("replica_published", sequence=message.sequence)
                for worker in self._workers:
                    self._spawn(self._publish_to(worker, message))
            case Changed():
                self._overlay = message if message.overlay else None
                for worker in self._workers:
                    worker.notify(message)
            case FollowerStatus():
                self._status = message
                if self._settings.worker.max_staleness_s:
                    for worker in self._workers:
                        worker.notify(message)
            case _:
                raise AssertionError(f"a follower does not say {type(message).__name__}")
        return None

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Operators

    async def _control_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        channel.handler = functools.partial(self._from_operator, channel)
        try:
            await channel.serve()
        finally:
            self._traces.gone(channel)

    async def _from_operator(self, operator: Channel, message: Message) -> Message | None:
        match message:
            case StartTrace():
                return self._traces.begin(message, operator)
            case ListSessions():
                answers = await self._ask_workers(message)
                return Sessions(
                    [session for answer in answers for session in cast("Sessions", answer).sessions]
                )
            case ListDeadLetters() | RetryDeadLetters() | DiscardDeadLetters():
                return add_up(message, await self._ask_workers(message, _DEAD_LETTERS_TIMEOUT_S))
            case Kick():
                answers = await self._ask_workers(message)
                count = sum(cast("Done", answer).count for answer in answers)
                log.info("kicked", realm=message.realm, device=message.device, sessions=count)
                return Done(count)
            case SendCommand():
                return await self._commands.send(message)
            case _:
                raise ControlError(
                    f"this gateway does not know {type(message).__name__}: are both of one version?"
                )

    async def _ask_workers(self, message: Message, timeout_s: float = _ASK_TIMEOUT_S) -> list[Message]:
        return await asyncio.gather(*(worker.call(message, timeout_s) for worker in self._workers))

    def _log_start(self, admin_address: str) -> None:
        for name, socks in self._sockets.items():
            host, port = socks[0].getsockname()[:2]
            log.info("listening", listener=name, address=str(Address(host, port)))
        log.info("admin_listening", address=admin_address)
        log.info("started", node=self._settings.name, workers=self._worker_count, pid=os.getpid())


def open_files_needed(connections: int, workers: int) -> int:
    """What a worker opens with its share of `connections`: a stream session takes two."""
    return 2 * -(-connections // workers) + _OTHER_FILES


def _allow_open_files(connections: int, workers: int) -> None:
    """Let each worker open what its share of `limits.connections` may take; children inherit it.

    The usual soft limit of 1,024 is there for programs that call select(), which an event loop does not.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    needed = open_files_needed(connections, workers)
    if most != resource.RLIM_INFINITY and most < needed:
        log.warning(
            "few_open_files",
            allowed=most,
            needed=needed,
            note="raise it for this service (LimitNOFILE=) or lower limits.connections",
        )


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Make `data_dir` ours: one gateway uses it at a time."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigurationError(
            f"node.data_dir: cannot write to {data_dir}: {exc.strerror}: make it writable for this user"
        ) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as exc:
        raise ConfigurationError(
            f"node.data_dir: another gateway uses {data_dir}: stop it, or give this one a data_dir of its own"
        ) from exc
    finally:
        os.close(lock)


@contextlib.contextmanager
def _listening(key: str, address: Address, count: int) -> Iterator[list[socket.socket]]:
    """`count` sockets on one address, each with a share of the connections that come in."""
    socks: list[socket.socket] = []
    try:
        # A foreign process that shares the port by SO_REUSEPORT would get a part of the devices: look without it first.
        _bound(address, share=False).close()
        for _ in range(count):
            socks.append(_listening_socket(address))
            if address.port == 0:
                address = Address(address.host, socks[0].getsockname()[1])
        yield socks
    except OSError as exc:
        if len(socks) == count:
            raise
        raise ConfigurationError(
            f"{key}: cannot listen on {address}: {exc.strerror or exc}: choose another address or stop what uses it"
        ) from exc
    finally:
        for sock in socks:
            sock.close()


def _bound(address: Address, *, share: bool) -> socket.socket:
    family, kind, protocol, _, target = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)
    except OSError:
        sock.close()
        raise
    return sock


def _listening_socket(address: Address) -> socket.socket:
    sock = _bound(address, share=True)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
