"""When credentials were last used, and how long they were not.

Idleness is counted in days of service: a number in the row of `feed` that goes up by one on every day (UTC) on which a
gateway runs and reaches the registry. A use writes the day into its credential, once a day at most, so

    days unused = the day now - the day of the last use

and both are whole numbers that stand in every replica. Days on which no gateway ran, or the registry was away, are no
days of service: no device becomes idle because it could not connect. Nothing is written when a credential becomes idle;
it is seen at the look-up.

The date is a node's own. One that is ahead of the others makes a day begin early, and not more often; one whose date was
far in the future holds the count until then, which lets devices in and keeps none out.
"""

import datetime as dt
from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, bindparam, select, update

from gateway.registry import schema
from gateway.registry.ledger import note_change

__all__ = ["USES_PER_CHANGE", "begin_service_day", "first_day", "record_uses"]

USES_PER_CHANGE: Final = 2_000
"""How many uses one change takes at most."""


def begin_service_day(connection: Connection, at: dt.datetime) -> bool:
    """Count the day of `at` as a day of service, when it is not counted yet; whether it was not."""
    feed = schema.feed
    today = at.date().isoformat()
    counted = connection.execute(
        update(feed)
        .where(feed.c.service_date < today)
        .values(service_day=feed.c.service_day + 1, service_date=today)
    )
    if not counted.rowcount:
        return False
    note_change(connection, "realm", 0, 0, at)  # the realms carry the day into the replicas
    return True


def record_uses(connection: Connection, uses: Mapping[int, dt.datetime], at: dt.datetime) -> int:
    """Write the last use of credentials (by id) that were not used on this day of service before; how many they were.

    One change without a row of the audit. At most `USES_PER_CHANGE` at once.
    """
    assert len(uses) <= USES_PER_CHANGE
    credentials = schema.credentials
    day = connection.execute(select(schema.feed.c.service_day)).scalar_one()
    # Rows first and the feed last, as every writer locks them.
    fresh = connection.scalars(
        select(credentials.c.id)
        .where(credentials.c.id.in_(sorted(uses)), credentials.c.used_on < day)
        .order_by(credentials.c.id)
        .with_for_update()
    ).all()
    if not fresh:
        return 0
    sequence = note_change(connection, "device", 0, 0, at)
    connection.execute(
        update(credentials)
        .where(credentials.c.id == bindparam("credential_id"))
        .values(last_used_at=bindparam("used_at"), used_on=day, used_sequence=sequence),
        [{"credential_id": number, "used_at": uses[number]} for number in fresh],
    )
    return len(fresh)


def first_day(connection: Connection) -> int:
    """What a new credential has as the day of its last use: the one before today, so that its first use is written.

    Read by itself: within an INSERT, MariaDB would lock the row of the feed to read it, and two writers that both have
    read it so stand in each other's way when they take their sequences.
    """
    return int(connection.execute(select(schema.feed.c.service_day - 1)).scalar_one())
