"""How far imports came that are not finished."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def _digest() -> sa.String:
    return (
        sa.String(64)
        .with_variant(sa.String(64, collation="C"), "postgresql")
        .with_variant(mysql.VARCHAR(64, charset="utf8mb4", collation="utf8mb4_nopad_bin"), "mysql", "mariadb")
    )


def upgrade() -> None:
    op.create_table(
        "imports",
        sa.Column("digest", _digest(), nullable=False),
        sa.Column("realm_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("options", _digest(), nullable=False),
        sa.Column("devices", sa.BigInteger(), nullable=False),
        sa.Column("last_line", sa.BigInteger(), nullable=False),
        sa.Column(
            "updated_at",
            sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("digest", "realm_id", "options", name=op.f("pk_imports")),
    )


def downgrade() -> None:
    op.drop_table("imports")
