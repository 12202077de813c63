import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.errors import SpoolDamaged, SpoolError
from gateway.forward.message import Message
from gateway.forward.outbox.folder import SpoolFolder
from gateway.forward.outbox.store import WEIGHT, DeadLetter, Group, SpoolStore


def message(number: int, device: str = "d", payload: bytes = b"x") -> Message:
    return Message(
        "default", device, f"id-{device}", "g", "session", number, 12.5, payload, {"site": "a"}, None
    )


def group(*numbers: int, device: str = "d", payload: bytes = b"x", since: float = 12.5) -> Group:
    return Group([message(number, device, payload) for number in numbers], since)


def dead(number: int, reason: str = "no", at: float = 20.0) -> DeadLetter:
    return DeadLetter(message(number), reason, at)


def numbers(groups: list[Group]) -> list[list[int]]:
    return [[each.sequence for each in group.messages] for group in groups]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpoolStore]:
    store = SpoolStore(tmp_path / "s.db", "full")
    summary = store.open()
    assert (summary.messages, summary.dead_letters) == (0, 0)
    yield store
    store.close()
    store.close()


@pytest.fixture
def reopened(store: SpoolStore) -> Iterator[Callable[[], SpoolStore]]:
    """The same spool as the next process finds it."""
    with contextlib.ExitStack() as opened:

        def reopen() -> SpoolStore:
            store.close()
            again = SpoolStore(store.path, "normal")
            again.open()
            opened.callback(again.close)
            return again

        yield reopen


class TestGroups:
    def test_messages_come_back_as_they_were(
        self, store: SpoolStore, reopened: Callable[[], SpoolStore]
    ) -> None:
        odd = Message("r", "d\0", "é", None, "s", 1, 0.1, os.urandom(300), {}, "own id")
        store.commit(Group([odd, message(2)], 7.25))
        (found,) = reopened().read(0, 1)
        assert found.messages == [odd, message(2)]
        assert (found.since, found.number) == (7.25, 1)
        assert found.weight == 301 + 2 * WEIGHT
        assert found.devices == {("r", "d\0"): 300 + WEIGHT, ("default", "d"): 1 + WEIGHT}

    def test_order_and_numbers_go_on_after_reopening(
        self, store: SpoolStore, reopened: Callable[[], SpoolStore]
    ) -> None:
        for start in (1, 3, 5):
            store.commit(group(start, start + 1))
        again = reopened()
        again.commit(group(7), delete_through=1)
        assert numbers(again.read(0, 1 << 20)) == [[3, 4], [5, 6], [7]]
        assert [each.number for each in again.read(2, 1 << 20)] == [3, 4]

    def test_reading_is_bounded_but_gives_one(self, store: SpoolStore) -> None:
        for number in range(1, 6):
            store.commit(group(number, payload=bytes(1000)))
        assert numbers(store.read(0, 1)) == [[1]]
        assert numbers(store.read(0, 2000)) == [[1], [2]]
        assert store.read(5, 2000) == []

    def test_the_summary(self, store: SpoolStore) -> None:
        store.commit(group(1, 2, device="a"))
        store.commit(group(3, device="b", payload=b"12345"), dead=[dead(9)])
        store.close()
        summary = store.open()
        assert summary.messages == 3
        assert summary.devices == {("default", "a"): 2 * (1 + WEIGHT), ("default", "b"): 5 + WEIGHT}
        assert (summary.dead_letters, summary.dead_weight) == (1, 1 + WEIGHT)

    def test_what_is_given_back_is_given_to_the_file_system(self, store: SpoolStore) -> None:
        for number in range(1, 60):
            store.commit(group(number, payload=bytes(100_000)))
        store.commit(None, delete_through=59)
        store.make_room()
        full = store.path.stat().st_size
        for _ in range(3):
            store.shrink()
        store.make_room()
        assert store.path.stat().st_size < full / 2

    def test_only_one_process_opens_it(self, store: SpoolStore) -> None:
        with (
            sqlite3.connect(store.path, timeout=0) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("SELECT * FROM groups")
        other.close()

    def test_files_are_the_gateways_own(self, store: SpoolStore) -> None:
        store.commit(group(1))
        for name in ("s.db", "s.db-wal"):
            assert store.path.with_name(name).stat().st_mode & 0o777 == 0o600


class TestDeadLetters:
    def test_kept_with_the_deletion(self, store: SpoolStore, reopened: Callable[[], SpoolStore]) -> None:
        store.commit(group(1, 2))
        store.commit(None, 1, [dead(1), dead(2, "never")])
        again = reopened()
        assert again.read(0, 1) == []
        assert again.dead_letters(None, 10) == [dead(1), dead(2, "never")]
        assert again.dead_letters(None, 1) == [dead(1)]
        assert again.dead_letters(["session-2", "other"], 10) == [dead(2, "never")]

    def test_requeue(self, store: SpoolStore) -> None:
        store.commit(group(5))
        store.commit(None, 0, [dead(1), dead(2)])
        requeued = store.requeue([dead(1)], 99.0)
        assert (requeued.number, requeued.since) == (2, 99.0)
        assert numbers(store.read(0, 1 << 20)) == [[5], [1]]
        assert store.dead_letters(None, 10) == [dead(2)]

    def test_discard(self, store: SpoolStore) -> None:
        store.commit(None, 0, [dead(1), dead(2)])
        store.discard([dead(1)])
        assert store.dead_letters(None, 10) == [dead(2)]


class TestFaults:
    def test_a_failed_commit_changes_nothing(self, store: SpoolStore) -> None:
        store.commit(group(1))
        store._db.execute("PRAGMA max_page_count = 10")
        with pytest.raises(SpoolError, match="full"):
            store.commit(group(2, payload=bytes(100_000)), delete_through=1)
        store._db.execute("PRAGMA max_page_count = 100000")
        assert numbers(store.read(0, 1 << 20)) == [[1]]
        store.commit(group(3))
        assert numbers(store.read(0, 1 << 20)) == [[1], [3]]

    def test_start_over(self, store: SpoolStore) -> None:
        store.commit(group(1))
        store.start_over()
        assert store.read(0, 1) == []
        store.commit(group(2))
        assert [each.number for each in store.read(1, 1)] == [2]  # numbers never go back in one life

    def test_a_body_that_was_changed_is_put_aside(
        self, store: SpoolStore, reopened: Callable[[], SpoolStore]
    ) -> None:
        for number in (1, 2, 3):
            store.commit(group(number))
        store._db.execute("UPDATE groups SET body = zeroblob(length(body)) WHERE number = 2")
        assert numbers(store.read(0, 1 << 20)) == [[1], [3]]
        assert store.damaged_messages == 1
        assert numbers(store.read(0, 1 << 20)) == [[1], [3]]
        assert reopened().damaged_messages == 1

    @pytest.mark.parametrize("content", [b"", b"not a database", pytest.param(os.urandom(8192), id="noise")])
    def test_a_file_that_is_no_database(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "s.db"
        path.write_bytes(content)
        store = SpoolStore(path, "full")
        if content:
            with pytest.raises(SpoolDamaged):
                store.open()
            summary, aside = store.recover()
            assert summary.messages == 0
            assert aside.read_bytes() == content
        else:
            store.open()
        store.commit(group(1))
        store.close()

    def test_what_can_be_read_is_saved(self, store: SpoolStore) -> None:
        for number in range(1, 200):
            store.commit(group(number, payload=bytes(2000)))
        store.commit(None, 0, [dead(500)])
        store.close()
        with store.path.open("r+b") as file:
            file.seek(store.path.stat().st_size // 2)
            file.write(os.urandom(4096))
        summary, aside = store.recover()
        saved = [number for each in numbers(store.read(0, 1 << 30)) for number in each]
        assert saved == sorted(saved)
        assert 190 <= len(saved) == summary.messages < 200
        assert len(store.dead_letters(None, 10)) == 1
        store.commit(group(1000))
        assert numbers(store.read(0, 1 << 30))[-1] == [1000]
        assert aside.exists()

    def test_a_newer_format_is_left_alone(self, store: SpoolStore) -> None:
        store._db.execute("PRAGMA user_version = 99")
        store.close()
        with pytest.raises(SpoolError, match="spool format 99, this program knows 1: upgrade it"):
            store.open()


class TestFolder:
    def test_who_owns_what(self, tmp_path: Path) -> None:
        folder = SpoolFolder(tmp_path / "spool" / "route")
        assert folder.ownerless() is None
        first, second = folder.take(), folder.take()
        assert first.database != second.database
        assert folder.ownerless() is None
        first.release()
        first.release()
        again = folder.ownerless()
        assert again is not None
        assert again.database == first.database
        again.release()
        taken = folder.take()
        assert taken.database == first.database
        taken.remove()
        second.remove()
        assert list(folder.path.iterdir()) == []

    def test_one_that_is_being_removed_is_not_claimed(self, tmp_path: Path) -> None:
        folder = SpoolFolder(tmp_path)
        claim = folder.take()
        lock = claim.database.with_suffix(".lock")
        lock.unlink()
        lock.touch()  # a new file under the name
        claim.release()
        other = folder.ownerless()
        assert other is not None
        other.remove()
