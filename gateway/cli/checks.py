"""What `doctor` looks at: each check gives findings, and every finding that is not well comes with a fix.

Nothing here changes anything: no file is made, no message sent, no schema touched.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from gateway.errors import (
    BackendError,
    ConfigurationError,
    GatewayError,
    RegistryMismatch,
    RegistryUnavailable,
)

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.registry.feed import Head
    from gateway.server.settings import Address
    from gateway.tls.session import ClientSession, ServerSession

__all__ = ["Finding", "examine"]

Status = Literal["ok", "warning", "error"]

BACKEND_S: Final = 10.0
"""How long a backend may take to answer; a service that needs longer serves no device."""
CONTROL_S: Final = 3.0
CLOCK_DIFFERENCE_MAX_S: Final = 5.0
"""Credentials are valid from and to points in time: the clocks of node and registry may differ by a little only."""
REPLICA_AGE_MAX_S: Final = 300.0
"""A follower that runs stores the time of its last good poll every minute."""
MOMENT_OF_WRITING: Final = 1_767_225_600.0
"""2026-01-01: no clock that is set shows an earlier time."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    check: str
    status: Status
    detail: str
    fix: str = ""


def examine(path: Path) -> Iterator[Finding]:
    """All checks on the configuration at `path`; a configuration that is wrong is the only finding then."""
    from gateway.config import load

    try:
        settings = load(path)
    except ConfigurationError as exc:
        yield Finding("configuration", "error", str(exc), f"correct {path}, then run doctor again")
        return
    yield Finding("configuration", "ok", f"{path} is valid")
    is_running = _is_running(settings.node.data_dir)
    yield from _file_modes(path, settings)
    head: list[Head] = []
    yield from _registry(settings, head)
    yield from _replica(settings, head[0] if head else None, is_running=is_running)
    yield from _ports(settings, is_running=is_running)
    yield from _clock(settings)
    yield from _tls(settings)
    yield from _backends(settings)


# Files


def _is_running(data_dir: Path) -> bool:
    """Whether a gateway answers on the control socket of this folder."""
    from gateway.errors import ControlError
    from gateway.server.control import connect_unix
    from gateway.server.supervisor import CONTROL_SOCKET

    async def connect() -> bool:
        try:
            async with asyncio.timeout(CONTROL_S), connect_unix(data_dir / CONTROL_SOCKET):
                return True
        except (ControlError, TimeoutError):
            return False

    return asyncio.run(connect())


def _file_modes(path: Path, settings: "GatewaySettings") -> Iterator[Finding]:
    private = [(path, "it may hold passwords"), *_key_files(settings)]
    database = settings.registry.url.removeprefix("sqlite:///")
    if database != settings.registry.url:
        private.append((Path(database), "it holds the devices"))
    fine = True
    for file, why in private:
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
        except OSError:
            continue  # who needs it says that it is missing
        if mode & 0o077:
            fine = False
            yield Finding(
                "files",
                "warning",
                f"{file} is open to others (mode {mode:04o}), and {why}",
                f"chmod 600 {file}",
            )
    data_dir = settings.node.data_dir
    place = next(each for each in (data_dir, *data_dir.parents) if each.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        fine = False
        yield Finding(
            "files",
            "error",
            f"node.data_dir {data_dir} cannot be written by this user",
            f"chown it: chown -R $USER {place}",
        )
    elif place == data_dir and stat.S_IMODE(data_dir.stat().st_mode) & 0o022:
        fine = False
        yield Finding(
            "files", "error", f"node.data_dir {data_dir} can be written by others", f"chmod 700 {data_dir}"
        )
    if fine:
        yield Finding("files", "ok", "the modes of configuration, keys and data are right")


def _key_files(settings: "GatewaySettings") -> list[tuple[Path, str]]:
    files = []
    for name, backend in settings.backends.items():
        if key := getattr(backend, "key_file", None):
            files.append((Path(key), f"it is the private key of backend {name}"))
    return files


# Registry and replica


def _registry(settings: "GatewaySettings", found: "list[Head]") -> Iterator[Finding]:
    from gateway.registry import feed
    from gateway.registry.database import make_engine, read
    from gateway.registry.founding import open_secrets
    from gateway.registry.migrate import check_schema

    engine = make_engine(settings.registry.url)
    try:
        check_schema(engine)
        with read(engine) as connection:
            head = feed.head(connection)
            credentials = feed.credential_count(connection)
        found.append(head)
        yield Finding("registry", "ok", f"it answers, has the newest schema and {credentials} credentials")
    except RegistryMismatch as exc:
        yield Finding("registry", "error", str(exc), "run `gatewayctl migrate`, or the newer program")
        return
    except RegistryUnavailable as exc:
        yield Finding("registry", "error", str(exc), "start the database, and check registry.url")
        return
    finally:
        engine.dispose()
    try:
        source = settings.registry.master_keys()
        with read(engine) as connection:
            open_secrets(connection, source.sealer(), source.place)
    except GatewayError as exc:
        yield Finding(
            "master key",
            "error",
            str(exc),
            "put the master key of this registry where registry.master_key_* says",
        )
    else:
        yield Finding("master key", "ok", f"{source.place} opens the registry")
    finally:
        engine.dispose()


def _replica(settings: "GatewaySettings", head: "Head | None", *, is_running: bool) -> Iterator[Finding]:
    from gateway.registry.replica import ReplicaReader, current_generation

    folder = settings.node.data_dir / "replica"
    generation = current_generation(folder)
    if generation is None:
        text = "there is none yet: the gateway copies the registry when it starts"
        if is_running:
            yield Finding(
                "replica",
                "error",
                "the gateway runs and has no replica",
                "see its log for `follower`, it says why",
            )
        else:
            yield Finding("replica", "ok", text)
        return
    remake = f"stop the gateway, delete {folder}, start it: the replica is copied anew"
    try:
        with ReplicaReader.open(generation) as reader:
            meta = reader.meta()
    except GatewayError as exc:
        yield Finding("replica", "error", str(exc), remake)
        return
    if meta is None:
        yield Finding("replica", "error", f"{generation} cannot be read", remake)
    elif head is not None and meta.registry_id != head.registry_id:
        status: Status = "error" if is_running else "warning"
        yield Finding("replica", status, "it is a copy of another registry", remake)
    elif is_running and time.time() - meta.polled_at > REPLICA_AGE_MAX_S:
        age_s = time.time() - meta.polled_at
        yield Finding(
            "replica",
            "error",
            f"it was last compared with the registry {age_s:.0f} s ago",
            "see the log for `follower`, it says why",
        )
    else:
        behind = "" if head is None else f", {max(0, head.sequence - meta.sequence)} changes behind"
        yield Finding("replica", "ok", f"it can be read{behind}")


# Ports


def _ports(settings: "GatewaySettings", *, is_running: bool) -> Iterator[Finding]:
    wanted = [(f"listener {each.name}", each.bind) for each in settings.listeners]
    wanted.append(("admin endpoint", settings.admin.bind))
    for name, address in wanted:
        if not address.port:
            yield Finding("ports", "ok", f"{name}: the kernel chooses its port")
        elif is_running:
            yield _answering(name, address)
        else:
            yield _bindable(name, address)


def _answering(name: str, address: "Address") -> Finding:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 -- compared, not bound
    try:
        with socket.create_connection((host, address.port), 3):
            pass
    except OSError as exc:
        return Finding(
            "ports", "error", f"{name}: the gateway runs and {address} does not answer: {exc.strerror or exc}",
            "see the gateway's log; the configuration may be newer than the running gateway: restart it",
        )  # fmt: skip
    return Finding("ports", "ok", f"{name}: {address} answers")


def _bindable(name: str, address: "Address") -> Finding:
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(where)
                sock.listen(1)
    except OSError as exc:
        fix = {
            errno.EADDRINUSE: f"stop what listens there (`ss -ltnp 'sport = :{address.port}'` names it), or choose another port",
            errno.EACCES: "choose a port from 1024, or give the program CAP_NET_BIND_SERVICE",
            errno.EADDRNOTAVAIL: f"{address.host} is no address of this host: choose one of `ip address`, or 0.0.0.0",
        }.get(exc.errno or 0, "choose another address")
        return Finding("ports", "error", f"{name}: cannot listen on {address}: {exc.strerror or exc}", fix)
    return Finding("ports", "ok", f"{name}: {address} is free")


# Clock


def _clock(settings: "GatewaySettings") -> Iterator[Finding]:
    fix = "set the clock by NTP: systemctl enable --now systemd-timesyncd"
    now = time.time()
    if now < MOMENT_OF_WRITING:
        yield Finding("clock", "error", f"it shows {time.strftime('%Y-%m-%d', time.gmtime(now))}", fix)
        return
    difference_s = _database_clock(settings.registry.url)
    if difference_s is not None and abs(difference_s) > CLOCK_DIFFERENCE_MAX_S:
        yield Finding("clock", "error", f"it differs from the registry's by {difference_s:+.1f} s", fix)
        return
    compared = "" if difference_s is None else ", and the registry's agrees"
    yield Finding(
        "clock", "ok", f"it shows {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(now))}{compared}"
    )


def _database_clock(url: str) -> float | None:
    """Seconds that the clock of the database's host is ahead of ours; None where it is the same host's."""
    from sqlalchemy import text

    from gateway.registry.database import make_engine, read

    if url.startswith("sqlite"):
        return None
    question = (
        "SELECT EXTRACT(EPOCH FROM clock_timestamp())"
        if url.startswith("postgresql")
        else "SELECT UNIX_TIMESTAMP(SYSDATE(6))"
    )
    engine = make_engine(url)
    try:
        with read(engine) as connection:
            asked_at = time.time()
            there = float(connection.execute(text(question)).scalar_one())
            return there - (asked_at + time.time()) / 2
    except GatewayError:
        return None  # the registry's own finding says so
    finally:
        engine.dispose()


# TLS


def _tls(settings: "GatewaySettings") -> Iterator[Finding]:
    """A handshake in memory for each profile in use and each version of TLS."""
    from gateway.tls.openssl import ClientContext, TlsVersion, library_version
    from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName

    fix = "reinstall pyopenssl and cryptography: pip install --force-reinstall pyopenssl cryptography"
    for name in sorted({listener.profile for listener in settings.listeners}):
        profile = PROFILES[ProfileName(name)]
        clients: dict[str, Callable[[], ClientContext]] = {
            "TLSv1.2": lambda suites=profile.tls12_suites: ClientContext(
                suites, (), highest=TlsVersion.TLS1_2
            ),  # type: ignore[misc]  # a default keeps this loop's value
            "TLSv1.3": lambda: ClientContext((), TLS13_SUITES["sha256"], lowest=TlsVersion.TLS1_3),
        }
        for version, make in clients.items():
            try:
                agreed = _shake_hands(make(), ProfileName(name))
            except Exception as exc:  # noqa: BLE001 -- whatever a broken library raises is a finding
                yield Finding("tls", "error", f"profile {name}, {version}: {exc or type(exc).__name__}", fix)
            else:
                yield Finding("tls", "ok", f"profile {name}: {agreed} ({library_version()})")


class _TestPolicy:
    """A registry of one device whose key everybody may know: it never leaves the memory."""

    def __init__(self, profile: Any) -> None:
        from gateway.tls.contexts import ContextStore

        self._contexts = ContextStore().contexts(profile, "doctor", ())

    def contexts_for(self, _hello: Any) -> Any:
        return self._contexts

    def choose_psk(self, offered: Sequence[Any]) -> Any:
        from gateway.tls.session import PskChoice

        return PskChoice(offered[0].identity, _TEST_KEY, "sha256")


_TEST_KEY: Final = bytes(range(32))


def _shake_hands(context: Any, profile: Any) -> str:
    from gateway.tls.session import ClientSession, Established, Failed, ServerSession

    client = ClientSession(context, lambda _hint: (b"doctor", _TEST_KEY, "sha256"))
    server = ServerSession(_TestPolicy(profile))
    try:
        for event in _converse(client, server):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Established):
                return f"{event.version} with {event.cipher} works"
    finally:
        client.free()
        server.free()
    raise AssertionError("the handshake stopped halfway")


def _converse(client: "ClientSession", server: "ServerSession") -> Iterator[Any]:
    while True:
        up = client.output()
        if up:
            yield from server.receive(up)
        down = server.output()
        if down:
            yield from client.receive(down)
        if not up and not down:
            return


# Backends


def _backends(settings: "GatewaySettings") -> Iterator[Finding]:
    routes = {route.backend: route for route in reversed(settings.routes)}
    for name, backend in settings.backends.items():
        check = f"backend {name}"
        if name not in routes:
            yield Finding(
                check, "warning", "no route uses it", f"remove [backends.{name}], or name it in a route"
            )
        try:
            said = asyncio.run(_try_backend(name, backend, settings.node.data_dir))
        except BackendError as exc:
            yield Finding(check, "error", str(exc), _backend_fix(backend.kind, str(exc)))
        else:
            yield Finding(check, "ok", said)


async def _try_backend(name: str, backend: Any, data_dir: Path) -> str:
    """What can be said of a backend that is well. Raises BackendError."""
    from gateway.errors import BackendUnavailable
    from gateway.forward.backends import SINKS
    from gateway.forward.backends.tcp import TcpBackend, TcpSettings

    if backend.kind == "file":
        return _try_file(name, backend.path)
    try:
        async with asyncio.timeout(BACKEND_S):
            if isinstance(backend, TcpSettings):
                quick = backend.model_copy(update={"connect_timeout_s": min(backend.connect_timeout_s, 3.0)})
                await TcpBackend(name, quick).connect(_Closing())
                return "the service takes connections"
            sink = SINKS[backend.kind](name, backend, "application/octet-stream", data_dir / "stdout.lock")
            try:
                await sink.open()
            finally:
                await sink.close()
    except TimeoutError:
        raise BackendUnavailable(f"backend {name}: no answer within {BACKEND_S:g} s") from None
    return "the service answers" if backend.kind == "http" else "the service answers and accepts the login"


class _Closing(asyncio.Protocol):
    """Ends the connection that it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _try_file(name: str, path: str) -> str:
    from gateway.errors import BackendUnavailable

    if path == "-":
        return "it writes to stdout"
    file = Path(path)
    place = file if file.exists() else file.parent
    if not place.exists():
        raise BackendUnavailable(f"backend {name}: the folder {place} does not exist")
    if not os.access(place, os.W_OK):
        raise BackendUnavailable(f"backend {name}: {place} cannot be written by this user")
    with contextlib.suppress(OSError):
        state = os.statvfs(place)
        free = state.f_bavail * state.f_frsize
        return f"{file} can be written, {free >> 20} MiB are free"
    return f"{file} can be written"


def _backend_fix(kind: str, said: str) -> str:
    if "check " in said or "create " in said or "bind one" in said:
        return said.rpartition(": ")[2]
    if kind == "file":
        return "make the folder, or make it writable for this user"
    if "certificate" in said or "TLS" in said or "_file" in said:
        return "check ca_file, cert_file, key_file and the host name in the URL"
    return "start the service, and check host and port in the configuration"
