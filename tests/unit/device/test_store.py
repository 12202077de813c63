"""Both stores keep what they took, in order and within their bounds."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.device.store import FileStore, MemoryStore, Store, Stored, StoreFull
from gateway.errors import DeviceError

MakeStore = Callable[..., Store]


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    def make(**bounds: int) -> Store:
        return (
            MemoryStore(**bounds) if request.param == "memory" else FileStore(tmp_path / "store.db", **bounds)
        )

    return make


def test_numbers_grow_and_bounds_hold(make: MakeStore) -> None:
    async def scenario() -> None:
        store = make(messages_max=3, bytes_max=100)
        assert await store.open() == []
        assert store.name
        one, two = await store.put(b"one"), await store.put(b"x" * 90)
        assert (one, two) == (Stored(1, b"one"), Stored(2, b"x" * 90))
        with pytest.raises(StoreFull, match="2 messages, 93 bytes"):
            await store.put(b"x" * 8)
        await store.put(b"3")
        with pytest.raises(StoreFull):
            await store.put(b"")
        store.remove(2)
        store.remove(2)
        assert (await store.put(b"x" * 90)).number == 4
        await store.close()
        await store.close()

    asyncio.run(scenario())


def test_a_file_outlives_its_client(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def first() -> str:
        store = FileStore(path)
        await store.open()
        await asyncio.gather(*(store.put(b"%d" % number) for number in range(1, 101)))
        for number in range(1, 51):
            store.remove(number)
        await store.close()
        return store.name

    async def second() -> str:
        store = FileStore(path)
        left = await store.open()
        assert [message.payload for message in left] == [b"%d" % number for number in range(51, 101)]
        for message in left:
            store.remove(message.number)
        await store.close()
        store = FileStore(path)
        assert await store.open() == []
        assert (await store.put(b"new")).number == 101
        await store.close()
        with pytest.raises(DeviceError, match="closed"):
            await store.put(b"late")
        return store.name

    assert asyncio.run(first()) == asyncio.run(second())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_cancelled_put_takes_the_message_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = FileStore(tmp_path / "store.db")
        await store.open()
        putting = [asyncio.get_running_loop().create_task(store.put(b"%d" % number)) for number in range(3)]
        await asyncio.sleep(0)
        putting[1].cancel()
        await asyncio.wait(putting)
        await store.close()
        store = FileStore(tmp_path / "store.db")
        assert [message.payload for message in await store.open()] == [b"0", b"2"]
        await store.close()

    asyncio.run(scenario())


def test_a_file_belongs_to_one_client(tmp_path: Path) -> None:
    async def scenario() -> None:
        store, other = FileStore(tmp_path / "store.db"), FileStore(tmp_path / "store.db")
        await store.open()
        with pytest.raises(DeviceError, match="another client"):
            await other.open()
        await store.close()
        assert await other.open() == []
        await other.close()

    asyncio.run(scenario())


def test_a_file_that_is_no_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"something else entirely" * 100)

    async def scenario() -> None:
        with pytest.raises(DeviceError, match=r"store\.db cannot be opened"):
            await FileStore(tmp_path / "store.db").open()
        with pytest.raises(DeviceError, match="No such file"):
            await FileStore(tmp_path / "none" / "store.db").open()

    asyncio.run(scenario())


def test_a_disk_that_takes_nothing_keeps_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = FileStore(tmp_path / "store.db", messages_max=1)
        await store.open()

        def full(_messages: object, _removed: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(store, "_commit", full)
            with pytest.raises(DeviceError, match="disk is full"):
                await store.put(b"lost")
        assert (await store.put(b"kept")).number == 2
        await store.close()

    asyncio.run(scenario())
