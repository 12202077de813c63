"""Credentials as they are written: keys made or derived, windows, rotation, revocation."""

import datetime as dt
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import RegistryRefused
from gateway.registry import identities, schema
from gateway.registry.ledger import Entry, Ledger
from gateway.registry.realms import UNCHANGED, KnownRealm, Unchanged, known_realm
from gateway.registry.sealing import Key
from gateway.registry.usage import first_day
from gateway.registry.vault import Vault

if TYPE_CHECKING:
    from gateway.registry.devices import KnownDevice

__all__ = [
    "NewCredential",
    "RotatedKey",
    "check_window",
    "credential_columns",
    "new_key",
    "revoke_key",
    "rotate_key",
    "same_key_as",
    "set_window",
]

_SAME_KEY_SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCredential:
    """What a device gets beside what it has. Without an `identity` it is the device's name with a number."""

    identity: str | None = None
    key: Key | None = None
    grace: dt.timedelta = dt.timedelta(days=30)
    """How long the credentials that are good now stay so."""
    not_after: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class RotatedKey:
    """A new credential, with its key: the only time that it is shown."""

    realm: str
    device: str
    identity: str
    key: Key
    hint: str | None
    not_after: dt.datetime | None
    old: tuple[tuple[str, dt.datetime], ...]
    """The credentials that it takes the place of, and when each of them ends."""
    same_key_as: tuple[str, ...]


def new_key(vault: Vault, realm: KnownRealm, identity: str, given: Key | None) -> tuple[Key, bytes]:
    """The key of a new credential, and what is stored of it: nothing, when it is derived.

    Raises:
        RegistryRefused: a key was given, and the realm derives its keys.

    """
    if not realm.is_derived:
        key = Key.generate() if given is None else given
        return key, vault.seal_key(realm.id, identity, key)
    if given is not None:
        raise RegistryRefused(
            f"the keys of realm {realm.name!r} are derived ({realm.key_source}): give no key, it is shown"
        )
    return vault.derive(realm.id, realm.key_source, realm.sealed_secret, identity), b""


def credential_columns(  # noqa: PLR0917 - the columns, in the order of the table
    device_id: int,
    realm_id: int,
    identity: str,
    hash_: str,
    created_at: dt.datetime,
    used_on: int,
) -> dict[str, Any]:
    """What every new row of credentials has, whoever writes it; key, fingerprint and window come to it.

    `used_on` is what `usage.first_day` gives.
    """
    return {
        "device_id": device_id,
        "realm_id": realm_id,
        "identity": identity,
        "hash": hash_,
        "created_at": created_at,
        "used_on": used_on,
    }


def check_window(not_before: dt.datetime | None, not_after: dt.datetime | None) -> None:
    """Raises RegistryRefused when nothing lies between them."""
    if not_before is not None and not_after is not None and not_before >= not_after:
        raise RegistryRefused("not-before must be earlier than not-after")


def same_key_as(connection: Connection, fingerprint: bytes, realm_id: int, identity: str) -> tuple[str, ...]:
    """Other credentials with this key, revoked ones included, as `realm/identity`; a few at most."""
    credentials, realms = schema.credentials, schema.realms
    rows = connection.execute(
        select(realms.c.name, credentials.c.identity)
        .join_from(credentials, realms, credentials.c.realm_id == realms.c.id)
        .where(
            credentials.c.fingerprint == fingerprint,
            (credentials.c.realm_id != realm_id) | (credentials.c.identity != identity),
        )
        .order_by(credentials.c.id)
        .limit(_SAME_KEY_SHOWN)
    )
    return tuple(f"{realm}/{other}" for realm, other in rows)


def set_window(
    connection: Connection,
    device_id: int,
    identity: str | None,
    not_before: dt.datetime | Unchanged | None,
    not_after: dt.datetime | Unchanged | None,
) -> dict[str, Any]:
    """Give one credential of a device another window; what differs from before, for the audit."""
    table = schema.credentials
    query = select(table.c.id, table.c.identity, table.c.not_before, table.c.not_after).where(
        table.c.device_id == device_id
    )
    if identity is not None:
        query = query.where(table.c.identity == identity)
    else:
        query = query.where(table.c.revoked_at.is_(None))
    rows = connection.execute(query.order_by(table.c.id).with_for_update()).all()
    if not rows:
        raise RegistryRefused(
            "the device has no credential"
            + (f" with the identity {identity!r}" if identity is not None else " that is not revoked")
            + ": `gatewayctl show-device` shows them"
        )
    if len(rows) > 1:
        names = ", ".join(repr(row.identity) for row in rows)
        raise RegistryRefused(f"the device has several credentials: name one of {names} with --identity")
    (row,) = rows
    wanted = {
        "not_before": row.not_before if not_before is UNCHANGED else not_before,
        "not_after": row.not_after if not_after is UNCHANGED else not_after,
    }
    check_window(wanted["not_before"], wanted["not_after"])
    changed = {key: value for key, value in wanted.items() if getattr(row, key) != value}
    if not changed:
        return {}
    connection.execute(update(table).where(table.c.id == row.id).values(**changed))
    return {"identity": row.identity, **changed}


def rotate_key(  # noqa: PLR0917 - connection, ledger and vault come first in every write
    connection: Connection,
    ledger: Ledger,
    vault: Vault,
    device: "KnownDevice",
    name: str,
    new: NewCredential,
) -> RotatedKey:
    """Add a credential beside those that the device has, and let these run out after the grace time.

    Raises:
        RegistryRefused: the identity is invalid, taken or was removed, or the windows conflict.

    """
    realm, now = device.realm, ledger.now()
    identity = _checked_identity(connection, realm, new.identity, name)
    key, sealed_key = new_key(
        vault, realm, identity, None if new.key is None else identities.check_key(new.key)
    )
    if new.not_after is not None and new.not_after <= now:
        raise RegistryRefused("the new key would be over already: give a later not-after")
    old = _let_run_out(connection, device.id, now, now + new.grace)
    try:
        connection.execute(
            insert(schema.credentials).values(
                **credential_columns(
                    device.id,
                    realm.id,
                    identity,
                    _hash_of_newest(connection, device.id),
                    now,
                    first_day(connection),
                ),
                sealed_key=sealed_key,
                fingerprint=vault.fingerprint(key),
                not_before=None,
                not_after=new.not_after,
            )
        )
    except IntegrityError as exc:  # somebody else took it between our look and our insert
        raise RegistryRefused(f"identity {identity!r} is taken in realm {realm.name!r}") from exc
    same = same_key_as(connection, vault.fingerprint(key), realm.id, identity)
    detail = {
        "identity": identity,
        "not_after": new.not_after,
        "old": [{"identity": each, "not_after": until} for each, until in old],
    }
    ledger.record(
        connection,
        Entry("device", device.id, device.id, "rotate-key", f"{realm.name}/{name}", detail),
    )
    return RotatedKey(realm.name, name, identity, key, realm.hint, new.not_after, old, same)


def _checked_identity(connection: Connection, realm: KnownRealm, given: str | None, name: str) -> str:
    if given is None:
        candidates = (f"{name}.{number}" for number in itertools.count(2))
        identity = next(each for each in candidates if _why_taken(connection, realm, each) is None)
        if len(identity.encode()) > identities.IDENTITY_BYTES_MAX:
            raise RegistryRefused(
                f"the name is too long to put a number behind it ({identities.IDENTITY_BYTES_MAX} bytes are "
                "allowed): name the new identity with --identity"
            )
        return identity
    identity = identities.parse_identity(given)
    if (why := _why_taken(connection, realm, identity)) is not None:
        raise RegistryRefused(why)
    return identity


def _why_taken(connection: Connection, realm: KnownRealm, identity: str) -> str | None:
    where = {"realm_id": realm.id, "identity": identity}
    for table, why in (
        (schema.credentials, f"identity {identity!r} is taken in realm {realm.name!r}"),
        (schema.tombstones, f"{identity!r} was removed: `gatewayctl add-device` alone lets it in again"),
    ):
        conditions = [table.c[column] == value for column, value in where.items()]
        if connection.execute(select(table.c.id).where(*conditions)).first() is not None:
            return why
    return None


def _hash_of_newest(connection: Connection, device_id: int) -> str:
    table = schema.credentials.c
    found = connection.execute(
        select(table.hash).where(table.device_id == device_id).order_by(table.id.desc()).limit(1)
    ).scalar()
    return found or "sha256"


def _let_run_out(
    connection: Connection, device_id: int, now: dt.datetime, until: dt.datetime
) -> tuple[tuple[str, dt.datetime], ...]:
    """End what the device has at `until`, where it does not end before."""
    table = schema.credentials
    rows = connection.execute(
        select(table.c.id, table.c.identity, table.c.not_before, table.c.not_after)
        .where(table.c.device_id == device_id, table.c.revoked_at.is_(None))
        .order_by(table.c.id)
        .with_for_update()
    ).all()
    ends = []
    for row in rows:
        if row.not_after is not None and row.not_after <= until:
            if row.not_after > now:
                ends.append((row.identity, row.not_after))
            continue
        if row.not_before is not None and row.not_before >= until:
            raise RegistryRefused(
                f"credential {row.identity!r} begins only after the grace time: revoke it, or give a longer --grace"
            )
        connection.execute(update(table).where(table.c.id == row.id).values(not_after=until))
        ends.append((row.identity, until))
    return tuple(ends)


def revoke_key(connection: Connection, ledger: Ledger, realm_name: str, identity: str) -> str | None:
    """Refuse a credential from now on; the name of its device, None when it was revoked before.

    Raises:
        RegistryRefused: there is no such identity.

    """
    identity = identities.parse_identity(identity)
    realm = known_realm(connection, realm_name)
    table, devices = schema.credentials, schema.devices
    row = connection.execute(
        select(table.c.id, table.c.device_id, table.c.revoked_at)
        .where(table.c.realm_id == realm.id, table.c.identity == identity)
        .with_for_update()
    ).first()
    if row is None:
        raise RegistryRefused(
            f"identity {identity!r} does not exist in realm {realm_name!r}: `gatewayctl show-device` shows a device's"
        )
    if row.revoked_at is not None:
        return None
    connection.execute(update(table).where(table.c.id == row.id).values(revoked_at=ledger.now()))
    device = connection.execute(select(devices.c.name).where(devices.c.id == row.device_id)).scalar_one()
    ledger.record(
        connection,
        Entry(
            "device",
            row.device_id,
            row.device_id,
            "revoke-key",
            f"{realm_name}/{device}",
            {"identity": identity},
        ),
    )
    return str(device)
