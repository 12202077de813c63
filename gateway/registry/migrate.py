"""The registry's schema: brought to the newest by Alembic, and checked before it is used."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, column, inspect, select, table

from gateway.errors import RegistryMismatch
from gateway.registry import feed
from gateway.registry.database import make_engine, read, write
from gateway.registry.schema import SCHEMA_REVISION

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["alembic_config", "check_schema", "migrate"]

_VERSION_TABLE = "alembic_version"


def migrate(url: str) -> str:
    """Bring the registry at `url` to the newest schema, making the file of an SQLite one; safe to repeat.

    Returns:
        The revision that it has now: a newer one than this program's, when that is compatible and thus left alone.

    Raises:
        RegistryUnavailable: the database is away.
        RegistryMismatch: its schema is newer and no longer for this program.

    """
    from alembic import command

    engine = make_engine(url, create=True)
    try:
        revision = _revision(engine)
        if revision is not None and revision > SCHEMA_REVISION:
            _check_newer(engine)
            return revision
        write(engine, lambda connection: command.upgrade(alembic_config(connection), "head"))
    finally:
        engine.dispose()
    return SCHEMA_REVISION


def alembic_config(connection: Connection) -> "Config":
    """Alembic's configuration for a connection that is in a transaction."""
    from alembic.config import Config

    config = Config(output_buffer=io.StringIO(), stdout=io.StringIO())
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _migrations() -> Path:
    """The migrations: inside the package when it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def check_schema(engine: Engine) -> None:
    """See that the registry has the schema that this program knows, or a newer one that is compatible.

    Raises:
        RegistryUnavailable: the database is away.
        RegistryMismatch: it has no schema, an older one, or one that this program must not use.

    """
    revision = _revision(engine)
    if revision is None:
        raise RegistryMismatch("the registry has no tables yet: run `gatewayctl migrate`")
    if revision < SCHEMA_REVISION:
        raise RegistryMismatch(
            f"the registry has schema {revision} and this program knows {SCHEMA_REVISION}: run `gatewayctl migrate`"
        )
    if revision > SCHEMA_REVISION:
        _check_newer(engine)


def _check_newer(engine: Engine) -> None:
    """See that a schema newer than this program's may be used by it."""
    with read(engine) as connection:
        feed.head(connection)


def _revision(engine: Engine) -> str | None:
    with read(engine) as connection:
        if not inspect(connection).has_table(_VERSION_TABLE):
            return None
        return connection.execute(select(column("version_num")).select_from(table(_VERSION_TABLE))).scalar()
