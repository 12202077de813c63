"""From which migration on a program may use the registry: those after this one may only add, and leave it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    name = (
        sa.String(32)
        .with_variant(sa.String(32, collation="C"), "postgresql")
        .with_variant(mysql.VARCHAR(32, charset="utf8mb4", collation="utf8mb4_nopad_bin"), "mysql", "mariadb")
    )
    op.add_column("feed", sa.Column("compatible_from", name, nullable=False, server_default=revision))


def downgrade() -> None:
    op.drop_column("feed", "compatible_from")
