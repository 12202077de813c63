"""What programs after this one may do to the schema: one migration that only adds, and one that breaks."""

import shutil
from pathlib import Path

from alembic import command
from sqlalchemy import Connection, Engine

from gateway.registry import schema
from gateway.registry.database import write
from gateway.registry.migrate import alembic_config

__all__ = ["ADDITIVE", "BREAKING", "migrate_later"]

ADDITIVE = f"{int(schema.SCHEMA_REVISION) + 1:04}"
BREAKING = f"{int(schema.SCHEMA_REVISION) + 2:04}"

_FILE = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{revision}", "{before}", None, None


def upgrade() -> None:
    {upgrade}


def downgrade() -> None:
    raise NotImplementedError
"""
_ADDS = """op.add_column("devices", sa.Column("colour", sa.String(8), nullable=False, server_default="none"))
    op.create_table("palettes", sa.Column("id", sa.Integer(), primary_key=True))"""
_BREAKS = f"""op.alter_column("devices", "labels", new_column_name="marks", existing_type=sa.Text())
    op.execute("UPDATE feed SET compatible_from = '{BREAKING}'")"""


def migrate_later(engine: Engine, folder: Path, revision: str) -> None:
    """Migrate a registry as that later program would; `folder` is a temporary one."""
    migrations = folder / "later-migrations"
    if not migrations.exists():
        _copy(migrations)

    def upgrade(connection: Connection) -> None:
        config = alembic_config(connection)
        config.set_main_option("script_location", str(migrations))
        command.upgrade(config, revision)

    write(engine, upgrade)


def _copy(target: Path) -> None:
    """The migrations, with these two after the newest."""
    shutil.copytree(Path(__file__).parents[2] / "migrations", target)
    for revision, before, upgrade in (
        (ADDITIVE, schema.SCHEMA_REVISION, _ADDS),
        (BREAKING, ADDITIVE, _BREAKS),
    ):
        text = _FILE.format(revision=revision, before=before, upgrade=upgrade)
        (target / "versions" / f"{revision}.py").write_text(text)
