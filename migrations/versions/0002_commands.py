"""Commands that wait for their device."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _time() -> sa.DateTime:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def _id() -> sa.BigInteger:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "commands",
        sa.Column("id", _id(), nullable=False),
        sa.Column("device_id", _id(), nullable=False),
        sa.Column(
            "command_id",
            sa.String(36)
            .with_variant(sa.String(36, collation="C"), "postgresql")
            .with_variant(
                mysql.VARCHAR(36, charset="utf8mb4", collation="utf8mb4_nopad_bin"), "mysql", "mariadb"
            ),
            nullable=False,
        ),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", _time(), nullable=False),
        sa.Column("expires_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_commands_device_id"), ondelete="CASCADE"
        ),
        sa.UniqueConstraint("command_id", name=op.f("uq_commands_command_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_commands_device_id"), "commands", ["device_id"])
    op.create_index(op.f("ix_commands_expires_at"), "commands", ["expires_at"])


def downgrade() -> None:
    op.drop_table("commands")
