"""Commands that wait in the registry until their device connects, to whichever node that is.

`gatewayctl send-command --queue` adds one; the change of the device that it is part of takes it to every replica; the
worker that the device connects to sends it; the follower of that node removes it here. Between the delivery and the
removal a device that connects elsewhere may get it once more: its id tells.
"""

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, func, insert, or_, select

from gateway.errors import RegistryRefused
from gateway.registry import schema
from gateway.registry.ledger import Entry, Ledger, note_change
from gateway.registry.records import CommandRecord

__all__ = [
    "PAYLOAD_BYTES_MAX",
    "WAITING_PER_DEVICE_MAX",
    "WaitingCommand",
    "add_command",
    "cancel_command",
    "command_pages",
    "commands_of_devices",
    "remove_commands",
    "remove_expired_commands",
    "waiting_commands",
]

PAYLOAD_BYTES_MAX: Final = 65_535
"""What a BLOB of MariaDB holds, and a length16 frame nearly."""
WAITING_PER_DEVICE_MAX: Final = 100
"""A device that never comes back must not fill the registry and the replicas of all nodes."""
_PAGE_ROWS: Final = 500
_RANGES_PER_STATEMENT: Final = 100
_EXPIRED_PER_CALL: Final = 1_000


@dataclass(frozen=True, slots=True)
class WaitingCommand:
    """A command that waits, as an operator sees it."""

    realm: str
    device: str
    command_id: str
    payload: bytes
    created_at: dt.datetime
    expires_at: dt.datetime


def add_command(
    connection: Connection,
    *,
    device_id: int,
    command_id: str,
    payload: bytes,
    created_at: dt.datetime,
    expires_at: dt.datetime,
) -> None:
    """Let a command wait. The caller records the change.

    Raises:
        RegistryRefused: the payload is too large, or too many wait for this device.

    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise RegistryRefused(
            f"the payload has {len(payload)} bytes: at most {PAYLOAD_BYTES_MAX} can wait in the registry"
        )
    commands = schema.commands.c
    waiting = connection.execute(
        select(func.count())
        .select_from(schema.commands)
        .where(commands.device_id == device_id, commands.expires_at > created_at)
    ).scalar_one()
    if waiting >= WAITING_PER_DEVICE_MAX:
        raise RegistryRefused(
            f"{waiting} commands wait for this device already, as many as can: they go when it connects or they expire"
        )
    connection.execute(
        insert(schema.commands).values(
            device_id=device_id,
            command_id=command_id,
            payload=payload,
            created_at=created_at,
            expires_at=expires_at,
        )
    )


def waiting_commands(
    connection: Connection, now: dt.datetime, *, realm: str | None, device: str | None, limit: int
) -> list[WaitingCommand]:
    """Those that wait and have not expired, the oldest first, all or those of a realm or of a device's name."""
    commands, devices, realms = schema.commands.c, schema.devices.c, schema.realms.c
    query = (
        select(
            realms.name,
            devices.name,
            commands.command_id,
            commands.payload,
            commands.created_at,
            commands.expires_at,
        )
        .join(schema.devices, devices.id == commands.device_id)
        .join(schema.realms, realms.id == devices.realm_id)
        .where(commands.expires_at > now)
        .order_by(commands.id)
        .limit(limit)
    )
    if realm is not None:
        query = query.where(realms.name == realm)
    if device is not None:
        query = query.where(devices.name == device)
    return [WaitingCommand(*row) for row in connection.execute(query)]


def cancel_command(connection: Connection, ledger: Ledger, command_id: str) -> None:
    """Let a command wait no longer. One that is under way to its device just now may still arrive.

    Raises RegistryRefused: none with this id waits.
    """
    commands, devices, realms = schema.commands.c, schema.devices.c, schema.realms.c
    row = connection.execute(
        select(commands.id, commands.device_id, realms.name, devices.name)
        .join(schema.devices, devices.id == commands.device_id)
        .join(schema.realms, realms.id == devices.realm_id)
        .where(commands.command_id == command_id)
    ).first()
    if row is None:
        raise RegistryRefused(f"no command {command_id} waits: see `gatewayctl list-commands`")
    number, device_id, realm, device = row
    connection.execute(delete(schema.commands).where(commands.id == number))
    detail = {"command": command_id}
    ledger.record(
        connection, Entry("device", device_id, device_id, "cancel-command", f"{realm}/{device}", detail)
    )


def commands_of_devices(connection: Connection, ranges: Sequence[tuple[int, int]]) -> list[CommandRecord]:
    """All commands that wait for the devices in these ranges, both ends included."""
    device_id = schema.commands.c.device_id
    found: list[CommandRecord] = []
    for start in range(0, len(ranges), _RANGES_PER_STATEMENT):
        some = ranges[start : start + _RANGES_PER_STATEMENT]
        wanted = or_(*(device_id.between(first_id, last_id) for first_id, last_id in some))
        found += map(_record, connection.execute(select(*_COLUMNS).where(wanted)))
    return found


def command_pages(connection: Connection) -> Iterator[list[CommandRecord]]:
    """Every command that waits, page by page, by primary key."""
    last_id = 0
    while rows := connection.execute(
        select(*_COLUMNS)
        .where(schema.commands.c.id > last_id)
        .order_by(schema.commands.c.id)
        .limit(_PAGE_ROWS)
    ).all():
        last_id = rows[-1].id
        yield [_record(row) for row in rows]


def remove_commands(connection: Connection, numbers: Iterable[int], now: dt.datetime) -> int:
    """Remove those that were delivered, and let all replicas know. Returns how many were still there."""
    return _remove(connection, sorted(set(numbers)), now)


def remove_expired_commands(connection: Connection, now: dt.datetime) -> int:
    """Remove some that waited too long; to be called now and then. Returns how many."""
    commands = schema.commands.c
    expired = connection.scalars(
        select(commands.id).where(commands.expires_at <= now).order_by(commands.id).limit(_EXPIRED_PER_CALL)
    ).all()
    return _remove(connection, expired, now) if expired else 0


def _remove(connection: Connection, numbers: Sequence[int], now: dt.datetime) -> int:
    commands = schema.commands.c
    removed = 0
    device_ids: set[int] = set()
    for start in range(0, len(numbers), _PAGE_ROWS):
        some = commands.id.in_(numbers[start : start + _PAGE_ROWS])
        found = connection.scalars(select(commands.device_id).where(some)).all()
        removed += len(found)
        device_ids.update(found)
        connection.execute(delete(schema.commands).where(some))
    for device_id in sorted(device_ids):
        note_change(connection, "device", device_id, device_id, now)
    return removed


_COLUMNS: Final = (
    schema.commands.c.id,
    schema.commands.c.device_id,
    schema.commands.c.command_id,
    schema.commands.c.payload,
    schema.commands.c.expires_at,
)


def _record(row: Sequence[Any]) -> CommandRecord:
    number, device_id, command_id, payload, expires_at = row
    return CommandRecord(device_id, number, command_id, bytes(payload), expires_at.timestamp())
