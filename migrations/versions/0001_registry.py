"""The registry: realms, devices, credentials, the change feed, the audit and the registry's own secrets."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
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


def _text() -> sa.Text:
    return sa.Text().with_variant(mysql.TEXT(charset="utf8mb4", collation=_BYTEWISE), "mysql", "mariadb")


def _time() -> sa.DateTime:
    return sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def _id() -> sa.BigInteger:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _fingerprint() -> sa.LargeBinary:
    return sa.LargeBinary(16).with_variant(mysql.BINARY(16), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "realms",
        sa.Column("id", _id(), nullable=False),
        sa.Column("name", _name(64), nullable=False),
        sa.Column("hint", _name(128)),
        sa.Column("created_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_realms")),
        sa.UniqueConstraint("name", name=op.f("uq_realms_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "devices",
        sa.Column("id", _id(), nullable=False),
        sa.Column("realm_id", _id(), nullable=False),
        sa.Column("name", _name(128), nullable=False),
        sa.Column("group_name", _name(64)),
        sa.Column("labels", _text(), nullable=False),
        sa.Column("networks", _text(), nullable=False),
        sa.Column("disabled", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.ForeignKeyConstraint(["realm_id"], ["realms.id"], name=op.f("fk_devices_realm_id")),
        sa.UniqueConstraint("realm_id", "name", name=op.f("uq_devices_realm_id_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "credentials",
        sa.Column("id", _id(), nullable=False),
        sa.Column("device_id", _id(), nullable=False),
        sa.Column("realm_id", _id(), nullable=False),
        sa.Column("identity", _name(128), nullable=False),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", _fingerprint(), nullable=False),
        sa.Column("hash", _name(8), nullable=False),
        sa.Column("not_before", _time()),
        sa.Column("not_after", _time()),
        sa.Column("revoked_at", _time()),
        sa.Column("created_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_credentials_device_id")),
        sa.ForeignKeyConstraint(["realm_id"], ["realms.id"], name=op.f("fk_credentials_realm_id")),
        sa.UniqueConstraint("realm_id", "identity", name=op.f("uq_credentials_realm_id_identity")),
        sa.CheckConstraint("hash IN ('sha256', 'sha384')", name=op.f("ck_credentials_hash")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_credentials_device_id"), "credentials", ["device_id"])
    op.create_index(op.f("ix_credentials_fingerprint"), "credentials", ["fingerprint"])
    op.create_table(
        "feed",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("registry_id", _name(36), nullable=False),
        sa.Column("pruned_through", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feed")),
        sa.CheckConstraint("id = 1", name=op.f("ck_feed_one_row")),
    )
    op.create_table(
        "changes",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("scope", _name(16), nullable=False),
        sa.Column("first_id", sa.BigInteger(), nullable=False),
        sa.Column("last_id", sa.BigInteger(), nullable=False),
        sa.Column("at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_changes")),
        sa.CheckConstraint("scope IN ('device', 'realm')", name=op.f("ck_changes_scope")),
    )
    op.create_table(
        "audit",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", _time(), nullable=False),
        sa.Column("actor", _name(128), nullable=False),
        sa.Column("source", _name(255), nullable=False),
        sa.Column("action", _name(32), nullable=False),
        sa.Column("subject", _name(256), nullable=False),
        sa.Column("detail", _text(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit")),
    )
    op.create_table(
        "secrets",
        sa.Column("name", _name(32), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_secrets")),
    )


def downgrade() -> None:
    for table in ("secrets", "audit", "changes", "feed", "credentials", "devices", "realms"):
        op.drop_table(table)
