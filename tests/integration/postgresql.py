"""A PostgreSQL server of the tests' own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.database_server import Arguments, DatabaseServer, database_of, serving

__all__ = ["PostgresServer", "postgres_server", "postgres_url"]

_DEBIAN = Path("/usr/lib/postgresql")


class PostgresServer(DatabaseServer):
    account = "postgres"
    stop_signal = signal.SIGINT
    drop = "DROP DATABASE IF EXISTS {} WITH (FORCE)"
    refused = psycopg.OperationalError

    programs = ("postgres", "initdb", "pg_dump")

    @classmethod
    def path(cls) -> str:
        """Debian's, the newest first, which are not on the path, and what is on it."""
        found = sorted(_DEBIAN.glob("*/bin"), key=lambda path: int(path.parts[-2]), reverse=True)
        return ":".join([*map(str, found), os.defpath])

    def initialise(self) -> None:
        arguments = [
            "--auth=trust",
            "--username=postgres",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
        ]
        self.run("initdb", "--pgdata", self.folder / "data", *arguments, user=self.account_used)

    def command(self) -> Arguments:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "max_connections": "50",
        }
        return [
            str(self.program("postgres")),
            "-D",
            self.folder / "data",
            *(f"--{name}={value}" for name, value in settings.items()),
        ]

    def administer(self, statement: str) -> None:
        with psycopg.connect(
            f"host={self.folder} user=postgres dbname=postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def dump(self, url: str) -> bytes:
        database = url.partition("@/")[2].partition("?")[0]
        return self.run("pg_dump", "--host", self.folder, "--username", "postgres", database)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests of a run."""
    with serving(PostgresServer, "PostgreSQL") as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    with database_of(postgres_server) as url:
        yield url
