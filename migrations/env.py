"""Run by Alembic: migrations on the connection that `gateway.registry.migrate` gives, in its transaction."""

from alembic import context
from sqlalchemy import Connection, text

from gateway.registry.schema import metadata

_LOCK = 0x70736B6777  # "pskgw": two migrations at once wait for each other


def run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    context.configure(
        connection=connection,
        target_metadata=metadata,
        transactional_ddl=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
