"""Realms: how large the TLS records to their devices may be."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("realms", sa.Column("record_bytes_max", sa.Integer()))


def downgrade() -> None:
    op.drop_column("realms", "record_bytes_max")
