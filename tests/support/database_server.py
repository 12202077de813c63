"""A database server of the tests' own, on a unix socket in a temporary folder, with one database per test."""

import abc
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from tests.support.capabilities import missing

__all__ = ["DatabaseServer", "database_of", "serving"]

_START_TIMEOUT_S = 30

Arguments = Sequence[str | Path]


class DatabaseServer(abc.ABC):
    """A server that tests may stop and start again. It never listens on TCP and does not wait for its disk."""

    account: ClassVar[str]
    """Who runs it when root runs the tests: database servers refuse to run as root."""
    stop_signal: ClassVar[signal.Signals]
    """Ends it at once: sessions are cut, as when a server fails over."""
    drop: ClassVar[str]
    refused: ClassVar[type[Exception]]
    """What its driver raises while it does not listen yet."""
    programs: ClassVar[Sequence[str]]

    def __init__(self, folder: Path, account: str | None) -> None:
        self.folder = folder
        self.account_used = account
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @abc.abstractmethod
    def path(cls) -> str:
        """Where its programs may be, as in $PATH."""

    @classmethod
    def program(cls, name: str) -> str | None:
        """One of its programs; None when it is not installed."""
        return shutil.which(name, path=cls.path())

    @abc.abstractmethod
    def initialise(self) -> None:
        """Make its data."""

    @abc.abstractmethod
    def command(self) -> Arguments:
        """How it is started."""

    @abc.abstractmethod
    def administer(self, statement: str) -> None:
        """Execute something as its superuser."""

    @abc.abstractmethod
    def url(self, database: str) -> str:
        """For `registry.url`."""

    @abc.abstractmethod
    def dump(self, url: str) -> bytes:
        """Everything in a database, as its own program writes it."""

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, user=self.account_used, cwd=self.folder
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether it takes statements."""
        try:
            self.administer("SELECT 1")
        except self.refused:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(self.stop_signal)
            self._process.wait(30)
            self._process = None

    def create_database(self) -> str:
        """A new, empty database; its name."""
        name = f"test_{uuid.uuid4().hex}"
        self.administer(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        self.administer(self.drop.format(name))

    def run(self, name: str, *arguments: str | Path, user: str | None = None) -> bytes:
        """Run one of its programs to the end; what it printed."""
        command = [str(self.program(name)), *arguments]
        return subprocess.run(command, check=True, capture_output=True, user=user, cwd=self.folder).stdout


_Server = TypeVar("_Server", bound=DatabaseServer)


@contextlib.contextmanager
def serving(kind: type[_Server], name: str) -> Iterator[_Server]:
    """A running server; skipped where it is not installed, failed when CI is set."""
    if None in map(kind.program, kind.programs):
        missing(f"{name} is not installed")
    account = kind.account if os.geteuid() == 0 else None
    folder = Path(
        tempfile.mkdtemp(prefix=f"pskgw-{kind.account}-")
    )  # short: a socket's path may have 107 bytes
    server = kind(folder, account)
    try:
        if account is not None:
            try:
                entry = pwd.getpwnam(account)
            except KeyError:
                missing(f"there is no user {account} to run {name} as")
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        server.initialise()
        server.start()
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def database_of(server: DatabaseServer) -> Iterator[str]:
    """The URL of an empty database, which goes at the end."""
    name = server.create_database()
    yield server.url(name)
    server.drop_database(name)
