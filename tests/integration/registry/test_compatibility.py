"""A schema that is newer than this program: used when it only adds, refused when its makers say so."""

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Connection, Engine, select

from gateway.errors import RegistryMismatch
from gateway.registry import schema
from gateway.registry.database import read, write
from gateway.registry.follower import Follower
from gateway.registry.ledger import Author
from gateway.registry.migrate import alembic_config, check_schema, migrate
from gateway.registry.notices import Changed
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry
from tests.support.later_migrations import ADDITIVE, BREAKING, migrate_later

AUTHOR = Author("alice", "console.example")


def test_what_only_adds_is_used_and_left_alone(
    settings: RegistrySettings, engine: Engine, tmp_path: Path
) -> None:
    follower = Follower(settings, tmp_path / "replica", wall=lambda: 1.9e9)
    follower.open()
    follower.poll()
    try:
        with Registry(settings, AUTHOR) as registry:
            migrate_later(engine, tmp_path, ADDITIVE)
            registry.add_device(NewDevice(identity="through it"))
        follower.poll()
        with Registry(settings, AUTHOR) as registry:
            registry.add_device(NewDevice(identity="after it"))
        assert [type(notice) for notice in follower.poll()] == [Changed]
    finally:
        follower.close()
    check_schema(engine)
    assert migrate(settings.url) == ADDITIVE
    with read(engine) as connection:
        assert connection.exec_driver_sql("SELECT colour FROM devices").scalars().all() == ["none"] * 2


def test_what_breaks_is_refused_by_all(settings: RegistrySettings, engine: Engine, tmp_path: Path) -> None:
    follower = Follower(settings, tmp_path / "replica", wall=lambda: 1.9e9)
    follower.open()
    follower.poll()
    migrate_later(engine, tmp_path, BREAKING)
    advice = f"know schema {BREAKING}, and this one knows {schema.SCHEMA_REVISION}: upgrade this program"
    for use in (
        lambda: Registry(settings, AUTHOR).open(),
        lambda: check_schema(engine),
        lambda: migrate(settings.url),
        follower.poll,
    ):
        with pytest.raises(RegistryMismatch, match=advice):
            use()
    follower.close()


@pytest.mark.usefixtures("registry")
def test_migrations_and_founding_agree_on_what_is_compatible(engine: Engine) -> None:
    """A registry that was founded long ago and one of today say the same."""

    def to(revision: str) -> Callable[[Connection], None]:
        return lambda connection: command.upgrade(alembic_config(connection), revision)

    def compatible_from() -> str:
        with read(engine) as connection:
            return str(connection.execute(select(schema.feed.c.compatible_from)).scalar_one())

    assert compatible_from() == schema.COMPATIBLE_FROM
    write(engine, lambda connection: command.downgrade(alembic_config(connection), "0005"))
    write(engine, to("head"))
    assert compatible_from() == schema.COMPATIBLE_FROM
