"""Moving everything that is sealed to another master key, while gateways run.

Devices are gone through by id, some at a time; each step is one transaction, one change and one entry of the audit, and
seals anew only what is not yet sealed under the first master key. So it may be interrupted at any time: called again, it
passes quickly over what is done. Realms and the registry's own secrets come last, in one step. Nothing but the seal
changes: keys, fingerprints, decoys and the links of the audit stay what they were.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Engine, bindparam, func, select, update

from gateway.registry import schema
from gateway.registry.database import read, write
from gateway.registry.ledger import Entry, Ledger
from gateway.registry.sealing import Sealer, credential_context, realm_context, secret_context

__all__ = ["ResealProgress", "reseal"]

_CREDENTIALS_PER_STEP: Final = 1_000


@dataclass(frozen=True, slots=True)
class ResealProgress:
    """Credentials gone through so far, of how many, and what was sealed anew by then (secrets included)."""

    seen: int
    total: int
    resealed: int


def reseal(engine: Engine, ledger: Ledger, sealer: Sealer) -> Iterator[ResealProgress]:
    """Seal everything under the first master key of `sealer`, step by step.

    Raises:
        RegistryMismatch: something is sealed under a master key that is not there; what was done stays done.

    """
    with read(engine) as connection:
        total = connection.execute(select(func.count()).select_from(schema.credentials)).scalar_one()
    seen = resealed = 0
    place = (0, 0)
    while page := _page(engine, place):
        seen += len(page)
        place = (page[-1].device_id, page[-1].id)
        old = [row.id for row in page if row.sealed_key and not row.sealed_key.startswith(sealer.prefix)]
        if old:
            resealed += write(engine, partial(_reseal_keys, ledger=ledger, sealer=sealer, ids=old))
        yield ResealProgress(seen, max(total, seen), resealed)
    resealed += write(engine, lambda connection: _reseal_secrets(connection, ledger, sealer))
    yield ResealProgress(seen, max(total, seen), resealed)


def _page(engine: Engine, after: tuple[int, int]) -> Sequence[Any]:
    """The next credentials, those of a device together, so that a step touches few devices beside its own."""
    table = schema.credentials.c
    device_id, id_ = after
    query = (
        select(table.id, table.device_id, table.sealed_key)
        .where((table.device_id > device_id) | ((table.device_id == device_id) & (table.id > id_)))
        .order_by(table.device_id, table.id)
        .limit(_CREDENTIALS_PER_STEP)
    )
    with read(engine) as connection:
        return connection.execute(query).all()


def _reseal_keys(connection: Connection, ledger: Ledger, sealer: Sealer, ids: Sequence[int]) -> int:
    table = schema.credentials
    rows = connection.execute(
        select(table.c.id, table.c.device_id, table.c.realm_id, table.c.identity, table.c.sealed_key)
        .where(table.c.id.in_(ids))
        .order_by(table.c.id)
        .with_for_update()
    ).all()
    values = [
        {
            "credential_id": row.id,
            "sealed": _anew(sealer, row.sealed_key, credential_context(row.realm_id, row.identity.encode())),
        }
        for row in rows
    ]
    if not values:  # they were removed meanwhile
        return 0
    connection.execute(
        update(table).where(table.c.id == bindparam("credential_id")).values(sealed_key=bindparam("sealed")),
        values,
    )
    device_ids = [row.device_id for row in rows]
    detail = {"credentials": len(values), "master_key": sealer.master_key_id.hex()}
    ledger.record(
        connection, Entry("device", min(device_ids), max(device_ids), "reseal-keys", "credentials", detail)
    )
    return len(values)


def _reseal_secrets(connection: Connection, ledger: Ledger, sealer: Sealer) -> int:
    """Those of the realms and of the registry itself."""
    realms, secrets = schema.realms, schema.secrets
    count = 0
    for row in connection.execute(select(realms.c.id, realms.c.sealed_secret).with_for_update()).all():
        if row.sealed_secret and not row.sealed_secret.startswith(sealer.prefix):
            sealed = _anew(sealer, row.sealed_secret, realm_context(row.id))
            connection.execute(update(realms).where(realms.c.id == row.id).values(sealed_secret=sealed))
            count += 1
    for row in connection.execute(select(secrets).with_for_update()).all():
        if not row.sealed.startswith(sealer.prefix):
            sealed = _anew(sealer, row.sealed, secret_context(row.name))
            connection.execute(update(secrets).where(secrets.c.name == row.name).values(sealed=sealed))
            count += 1
    if count:
        detail = {"secrets": count, "master_key": sealer.master_key_id.hex()}
        ledger.record(connection, Entry("realm", 0, 0, "reseal-keys", "secrets", detail))
    return count


def _anew(sealer: Sealer, sealed: bytes, context: bytes) -> bytes:
    return sealer.seal(sealer.open(bytes(sealed), context), context)
