"""A new registry: its id, its own secrets and the realm `default`; and the check that a master key opens it."""

import datetime as dt
import secrets
import uuid
from collections.abc import Callable

from sqlalchemy import Connection, insert, select

from gateway.errors import RegistryMismatch
from gateway.registry import feed, schema
from gateway.registry.audit import chain_rows
from gateway.registry.database import make_engine, write
from gateway.registry.ledger import Author, Entry, Ledger, utc_now
from gateway.registry.migrate import check_schema
from gateway.registry.sealing import Sealer, secret_context
from gateway.registry.settings import RegistrySettings

__all__ = ["SECRETS", "initialise", "open_secrets"]

SECRETS = ("fingerprint", "decoy", "audit")
"""Random keys of the registry's own: to find a key used twice, to make decoys, to chain the audit."""
_SECRET_BYTES = 32
_FIRST_REALM = "default"


def initialise(
    settings: RegistrySettings, author: Author, *, now: Callable[[], dt.datetime] = utc_now
) -> bool:
    """Found the registry in a migrated database, once: later calls only see that the master key opens it.

    Returns:
        Whether it was founded by this call.

    Raises:
        ConfigurationError: the master key file is missing or unfit.
        RegistryError: the database is away or does not fit, or the master key does not open the registry.

    """
    source = settings.master_keys()
    sealer = source.sealer()

    def work(connection: Connection) -> bool:
        if connection.execute(select(schema.feed.c.id).with_for_update()).first() is not None:
            chain_rows(connection, open_secrets(connection, sealer, source.place)["audit"])
            return False
        _found(connection, sealer, author, now)
        return True

    engine = make_engine(settings.url)
    try:
        check_schema(engine)
        return write(engine, work)
    finally:
        engine.dispose()


def _found(connection: Connection, sealer: Sealer, author: Author, now: Callable[[], dt.datetime]) -> None:
    connection.execute(
        insert(schema.feed).values(
            id=1,
            sequence=0,
            registry_id=str(uuid.uuid4()),
            pruned_through=0,
            compatible_from=schema.COMPATIBLE_FROM,
        )
    )
    made = {name: secrets.token_bytes(_SECRET_BYTES) for name in SECRETS}
    for name, secret in made.items():
        sealed = sealer.seal(secret, secret_context(name))
        connection.execute(insert(schema.secrets).values(name=name, sealed=sealed))
    result = connection.execute(insert(schema.realms).values(name=_FIRST_REALM, hint=None, created_at=now()))
    assert result.inserted_primary_key is not None
    (realm_id,) = result.inserted_primary_key
    entry = Entry("realm", realm_id, realm_id, "add-realm", _FIRST_REALM, {"hint": None})
    Ledger(author, now, made["audit"]).record(connection, entry)


def open_secrets(connection: Connection, sealer: Sealer, place: str) -> dict[str, bytes]:
    """The registry's own secrets, opened; `place` is where the master keys were found.

    Raises:
        RegistryMismatch: the master key is another one than they are sealed under, or there are none.

    """
    feed.head(connection)
    sealed = feed.secrets(connection)
    try:
        return {name: sealer.open(sealed[name], secret_context(name)) for name in SECRETS}
    except KeyError as exc:
        raise RegistryMismatch(
            f"the registry lacks its secret {exc}: restore the database from a backup"
        ) from exc
    except RegistryMismatch as exc:
        raise RegistryMismatch(
            f"the master key in {place} does not open this registry: "
            f"put the one there that it was made with, or was resealed under ({exc})"
        ) from exc
