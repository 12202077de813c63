"""Realms with a key source, limits and enrolment; last use of credentials; tombstones; the chained audit."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_BYTEWISE = "utf8mb4_nopad_bin"


def _name(characters_max: int) -> sa.String:
    return (
        sa.String(characters_max)
        .with_variant(sa.String(characters_max, collation="C"), "postgresql")
        .with_variant(
            mysql.VARCHAR(characters_max, charset="utf8mb4", collation=_BYTEWISE), "mysql", "mariadb"
        )
    )


def _time() -> sa.DateTime:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def _id() -> sa.BigInteger:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _columns() -> dict[str, list[sa.Column[Any]]]:
    return {
        "realms": [
            sa.Column("key_source", _name(16), nullable=False, server_default="stored"),
            sa.Column("sealed_secret", sa.LargeBinary()),
            sa.Column("enroll", _name(16), nullable=False, server_default="registered"),
            sa.Column("idle_days", sa.Integer()),
            sa.Column("sessions_per_device", sa.Integer()),
        ],
        "credentials": [
            sa.Column("last_used_at", _time()),
            sa.Column("used_on", sa.Integer(), nullable=False, server_default="0"),
            sa.Column("used_sequence", sa.BigInteger(), nullable=False, server_default="0"),
        ],
        "feed": [
            sa.Column("service_day", sa.Integer(), nullable=False, server_default="0"),
            sa.Column("service_date", _name(10), nullable=False, server_default=""),
            sa.Column("audit_sequence", sa.BigInteger(), nullable=False, server_default="0"),
            sa.Column("audit_chain", sa.LargeBinary()),
        ],
        "audit": [
            sa.Column("previous", sa.BigInteger()),
            sa.Column("chain", sa.LargeBinary()),
        ],
    }


def upgrade() -> None:
    for table, columns in _columns().items():
        for column in columns:
            op.add_column(table, column)
    op.create_index(op.f("ix_credentials_used_sequence"), "credentials", ["used_sequence"])
    op.create_table(
        "tombstones",
        sa.Column("id", _id(), nullable=False),
        sa.Column("device_id", sa.BigInteger(), nullable=False),
        sa.Column("realm_id", _id(), nullable=False),
        sa.Column("identity", _name(128), nullable=False),
        sa.Column("created_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tombstones")),
        sa.ForeignKeyConstraint(["realm_id"], ["realms.id"], name=op.f("fk_tombstones_realm_id")),
        sa.UniqueConstraint("realm_id", "identity", name=op.f("uq_tombstones_realm_id_identity")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_tombstones_device_id"), "tombstones", ["device_id"])


def downgrade() -> None:
    op.drop_table("tombstones")
    op.drop_index(op.f("ix_credentials_used_sequence"), "credentials")
    for table, columns in _columns().items():
        for column in reversed(columns):
            op.drop_column(table, column.name)
