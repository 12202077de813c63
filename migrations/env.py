"""Run by Alembic: migrations on the connection that `gateway.registry.migrate` gives, in its transaction."""

import contextlib
from collections.abc import Iterator

from alembic import context
from sqlalchemy import Connection, text

from gateway.registry.schema import metadata


@contextlib.contextmanager
def one_at_a_time(connection: Connection) -> Iterator[None]:
    """Let another migration wait. SQLite needs no more than its transaction."""
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(482871306103)"))
            yield
        case (
            "mysql" | "mariadb"
        ):  # commits with every statement that makes a table, so its lock is the session's
            wait = "SELECT GET_LOCK('psk-gateway migrations', 3600)"  # or until max_statement_time
            connection.execute(text(wait))
            try:
                yield
                connection.execute(text("COMMIT"))  # of the last revision's number: the next one reads it
            finally:
                connection.execute(text("SELECT RELEASE_LOCK('psk-gateway migrations')"))
        case _:
            yield


def run(connection: Connection) -> None:
    """Do what Alembic was asked for."""
    with one_at_a_time(connection):
        context.configure(
            connection=connection,
            target_metadata=metadata,
            transactional_ddl=connection.dialect.name in {"sqlite", "postgresql"},
            render_as_batch=True,
        )
        with context.begin_transaction():
            context.run_migrations()


run(context.config.attributes["connection"])
