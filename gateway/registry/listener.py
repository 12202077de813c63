"""PostgreSQL's word that the registry changed: a reader need not wait for its next look.

Every writer says NOTIFY in its transaction (`ledger`), so it is heard once the change is committed. It is a hint and
nothing more: what changed is in the feed, and a reader who hears nothing (a pooler between, an outage, another
database) looks at its interval all the same.
"""

import asyncio
from collections.abc import Callable

from sqlalchemy import make_url

from gateway.registry.database import CHANNEL, postgresql_arguments

__all__ = ["can_listen", "listen"]

_RETRY_S = 1.0


def can_listen(url: str) -> bool:
    """Whether the database of `registry.url` tells of changes."""
    return make_url(url).get_backend_name() == "postgresql"


async def listen(url: str, heard: Callable[[], object]) -> None:
    """Call `heard` after every change, and after every new connection, until cancelled."""
    import psycopg

    arguments = postgresql_arguments(url)
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(**arguments, autocommit=True) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                heard()  # what was committed before
                async for _ in connection.notifies():
                    heard()
        except psycopg.Error:
            await asyncio.sleep(_RETRY_S)  # the reader's own looks meet it, too, and tell
