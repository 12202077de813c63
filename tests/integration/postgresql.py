"""A PostgreSQL server of the tests' own: on a unix socket in a temporary folder, one database per test."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

_DEBIAN = Path("/usr/lib/postgresql")
_START_TIMEOUT_S = 30


class PostgresServer:
    """A server that tests may stop and start again. It never listens on TCP and does not wait for its disk."""

    def __init__(self, programs: Path, folder: Path, account: str | None) -> None:
        self._programs = programs
        self._folder = folder
        self._account = account
        self._process: subprocess.Popen[bytes] | None = None

    def initialise(self) -> None:
        arguments = [
            "--auth=trust",
            "--username=postgres",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
        ]
        subprocess.run(
            [self._programs / "initdb", "--pgdata", self._folder / "data", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._account,
            cwd=self._folder,
        )

    def start(self) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            "fsync": "off",
            "max_connections": "50",
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres",
                    "-D",
                    self._folder / "data",
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                stdout=log,
                stderr=log,
                user=self._account,
                cwd=self._folder,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._administer("SELECT 1")
            except psycopg.OperationalError as exc:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self._folder / "log").read_text()) from exc
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """At once: sessions are cut, as when a server fails over."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self._folder}"

    def create_database(self) -> str:
        """A new, empty database; its name."""
        name = f"test_{uuid.uuid4().hex}"
        self._administer(f'CREATE DATABASE "{name}"')
        return name

    def drop_database(self, name: str) -> None:
        self._administer(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def dump(self, url: str) -> bytes:
        """Everything in a database, as pg_dump writes it."""
        database = url.partition("@/")[2].partition("?")[0]
        command = [
            str(self._programs / "pg_dump"),
            "--host",
            str(self._folder),
            "--username",
            "postgres",
            database,
        ]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def _administer(self, statement: str) -> None:
        with psycopg.connect(
            f"host={self._folder} user=postgres dbname=postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())


def _programs() -> Path | None:
    """Where the server's programs are: the newest of Debian's, which are not on the path, or those on it."""
    found = sorted(_DEBIAN.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return None if on_path is None else Path(on_path).parent


def _missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set")
    pytest.skip(what)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests of a run; skipped without PostgreSQL, failed when CI is set."""
    programs = _programs()
    if programs is None:
        _missing("PostgreSQL is not installed")
    assert programs is not None
    account = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pskgw-postgresql-"))  # a short path: a socket's may have 107 bytes
    server = PostgresServer(programs, folder, account)
    try:
        if account is not None:
            try:
                entry = pwd.getpwnam(account)
            except KeyError:
                _missing("there is no user postgres to run PostgreSQL as")
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        server.initialise()
        server.start()
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.drop_database(name)
