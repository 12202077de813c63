"""PostgreSQL says that the registry changed, with the commit and not before; and after an outage again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection

from gateway.registry.database import make_engine, write
from gateway.registry.ledger import Author, Entry, Ledger, utc_now
from gateway.registry.listener import can_listen, listen
from gateway.registry.settings import RegistrySettings
from tests.integration.postgresql import PostgresServer

LEDGER = Ledger(Author("alice", "console.example"), utc_now, bytes(32))
DEADLINE_S = 30


@pytest.fixture
def settings(
    postgres_url: str, tmp_path: Path, new_registry: Callable[[str, Path], RegistrySettings]
) -> RegistrySettings:
    return new_registry(postgres_url, tmp_path)


@contextlib.asynccontextmanager
async def listening(url: str) -> AsyncIterator[asyncio.Event]:
    """A listener that is there: its first word is heard and forgotten."""
    heard = asyncio.Event()
    task = asyncio.get_running_loop().create_task(listen(url, heard.set))
    try:
        await next_word(heard)
        yield heard
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def next_word(heard: asyncio.Event) -> None:
    await asyncio.wait_for(heard.wait(), DEADLINE_S)
    heard.clear()


def record(connection: Connection) -> None:
    LEDGER.record(connection, Entry("realm", 1, 1, "update-realm", "default"))


def test_a_change_is_heard_with_its_commit(settings: RegistrySettings) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        engine = make_engine(settings.url)
        async with listening(settings.url) as heard:
            recorded = asyncio.Event()

            def slow(connection: Connection) -> None:
                record(connection)
                loop.call_soon_threadsafe(recorded.set)
                asyncio.run_coroutine_threadsafe(commit.wait(), loop).result(DEADLINE_S)

            commit = asyncio.Event()
            writing = asyncio.to_thread(write, engine, slow)
            written = loop.create_task(writing)
            await asyncio.wait_for(recorded.wait(), DEADLINE_S)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(heard.wait(), 0.3)
            commit.set()
            await next_word(heard)
            await written
        engine.dispose()

    asyncio.run(scenario())


def test_it_listens_again_after_an_outage(
    settings: RegistrySettings, postgres_server: PostgresServer
) -> None:
    async def scenario() -> None:
        engine = make_engine(settings.url)
        async with listening(settings.url) as heard:
            await asyncio.to_thread(postgres_server.stop)
            await asyncio.to_thread(postgres_server.start)
            await next_word(heard)  # there may be changes that it did not hear
            await asyncio.to_thread(write, engine, record)
            await next_word(heard)
        engine.dispose()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("url", "expected"),
    [("sqlite:////r.db", False), ("postgresql+psycopg://h/d", True), ("mysql+pymysql://h/d", False)],
)
def test_only_postgresql_tells(url: str, *, expected: bool) -> None:
    assert can_listen(url) is expected
