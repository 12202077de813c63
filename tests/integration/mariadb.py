"""A MariaDB server of the tests' own."""

import os
import signal
import socket
from collections.abc import Iterator

import pymysql
import pytest
from sqlalchemy import make_url

from tests.support.database_server import Arguments, DatabaseServer, database_of, serving

__all__ = ["MariaDbServer", "mariadb_server", "mariadb_url"]


class MariaDbServer(DatabaseServer):
    account = "mysql"
    stop_signal = signal.SIGKILL  # an orderly end waits for sessions, and its log brings the data back
    drop = "DROP DATABASE IF EXISTS {}"
    refused = pymysql.OperationalError

    programs = ("mariadbd", "mariadb-install-db", "mariadb-dump")

    @classmethod
    def path(cls) -> str:
        return f"{os.defpath}:/usr/sbin:/usr/local/sbin"

    def initialise(self) -> None:
        self.run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            user=self.account_used,
        )

    def command(self) -> Arguments:
        return [
            str(self.program("mariadbd")),
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            "--skip-networking",
            "--innodb-flush-log-at-trx-commit=2",  # what is committed outlives the server's death, not the machine's
            "--innodb-flush-method=nosync",
            "--debug-no-sync",
            "--innodb-buffer-pool-size=64M",
        ]

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:  # PyMySQL forgets a socket that does not connect
            if probe.connect_ex(str(self.folder / "socket")) != 0:
                return False
        return super().answers()

    def administer(self, statement: str) -> None:
        with (
            pymysql.connect(user="root", unix_socket=str(self.folder / "socket")) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)

    def url(self, database: str) -> str:
        return f"mysql+pymysql://root@/{database}?unix_socket={self.folder / 'socket'}"

    def dump(self, url: str) -> bytes:
        place, database = f"--socket={self.folder / 'socket'}", str(make_url(url).database)
        return self.run("mariadb-dump", "--no-defaults", place, "--user=root", database)


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDbServer]:
    """One server for all tests of a run."""
    with serving(MariaDbServer, "MariaDB") as server:
        yield server


@pytest.fixture
def mariadb_url(mariadb_server: MariaDbServer) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    with database_of(mariadb_server) as url:
        yield url
