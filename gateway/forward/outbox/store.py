"""One spool file: SQLite in WAL mode, used by one thread of one process.

Theory of operation. Messages are stored in groups, one row for all that one commit takes: SQLite then costs less than
a microsecond per message, and a statement lets the interpreter's other threads in once per group and not once per
message. Groups have ascending numbers and are deleted from the front, when all their messages are settled. The columns
in front of the body are all that opening reads: SQLite follows a long row only as far as it is asked to.

The file is opened with exclusive locking, so that the index of the WAL lives on the heap: there is no shared memory that
a truncated file could turn into SIGBUS, and nobody else can write. What a process that was killed had committed is in the
WAL and is found by the next open.

Each body has a CRC-32, since SQLite does not check what it reads. A group that does not match is moved out of the way and
kept; a file that SQLite cannot read any more is renamed, and what can be read of it is copied to a new one.
"""

import contextlib
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from gateway.errors import SpoolDamaged, SpoolError, SpoolFull
from gateway.files import sync_folder
from gateway.forward.message import Message

__all__ = ["WEIGHT", "DeadLetter", "Device", "Group", "SpoolStore", "Summary", "weigh"]

FORMAT: Final = 1
WEIGHT: Final = 256
"""What a message counts beside its payload: who sent it, and its part of the row and of the pages."""
_CHECKPOINT_PAGES: Final = 1000
_VACUUM_PAGES: Final = 25_000
_WAL_BYTES_KEPT: Final = 16 << 20
"""A WAL that grew beyond this is cut at the next checkpoint."""

Device = tuple[str, str]
"""Realm and name."""


def weigh(message: Message) -> int:
    """What a message counts against the bounds of a spool."""
    return len(message.payload) + WEIGHT


class Group:
    """The messages of one commit, in order. `number` is 0 until the store has given one."""

    __slots__ = ("devices", "messages", "number", "since", "weight")

    def __init__(self, messages: list[Message], since: float, number: int = 0) -> None:
        self.messages = messages
        self.since = since
        """when it began to wait, Unix seconds: when its first message was received, or was put back"""
        self.number = number
        self.devices: dict[Device, int] = {}
        """what the messages of each device weigh"""
        devices = self.devices
        for message in messages:
            device = (message.realm, message.device)
            devices[device] = devices.get(device, 0) + len(message.payload) + WEIGHT
        self.weight = sum(devices.values())


class DeadLetter(msgspec.Struct, frozen=True):
    """A message that will not be tried again by itself. `at` is Unix seconds, `reason` one line."""

    message: Message
    reason: str
    at: float

    @property
    def id(self) -> str:
        """Session and number of the message: unique, whatever ids the devices use."""
        return f"{self.message.session}-{self.message.sequence}"


class Summary(msgspec.Struct):
    """What a spool holds when it is opened."""

    messages: int = 0
    devices: Counter[Device] = msgspec.field(default_factory=Counter)
    """weight of each device's messages"""
    dead_letters: int = 0
    dead_weight: int = 0


class SpoolStore:
    """The file at `path`, made by `open` when it is not there. Every method may raise SpoolError, and its branches:
    SpoolFull when the disk is full (nothing changed), SpoolDamaged when `recover` is needed.
    """

    def __init__(self, path: Path, sync: Literal["full", "normal"]) -> None:
        self.path: Final = path
        self._sync = sync
        self._connection: sqlite3.Connection | None = None
        self._next = 1
        self.damaged_messages = 0
        """of groups that do not match their checksum; they are kept in the table `damaged`"""

    def open(self) -> Summary:
        """Open or create, and say what is there."""
        with _mapped(self.path):
            if not self.path.exists():
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
                sync_folder(self.path.parent)
            # One thread at a time, but not always the same one.
            connection = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, cached_statements=32
            )
            try:
                self._prepare(connection)
                summary = _summarise(connection, 0)
                (last,) = connection.execute("SELECT coalesce(max(number), 0) FROM groups").fetchone()
                (self.damaged_messages,) = connection.execute(
                    "SELECT coalesce(sum(messages), 0) FROM damaged"
                ).fetchone()
            except BaseException:
                connection.close()
                raise
        self._connection, self._next = connection, max(self._next, last + 1)
        return summary

    def commit(self, group: Group | None, delete_through: int = 0, dead: Sequence[DeadLetter] = ()) -> None:
        """In one transaction: append a group, delete those up to a number, keep dead letters. Safe on return."""
        with self._transaction() as connection:
            if dead:
                connection.executemany(
                    "INSERT OR REPLACE INTO dead_letters VALUES (?, ?, ?, ?)",
                    [
                        (letter.id, letter.message.device, weigh(letter.message), _encode(letter))
                        for letter in dead
                    ],
                )
            if group is not None:
                _insert(connection, self._next, group)
            if delete_through:
                connection.execute("DELETE FROM groups WHERE number <= ?", (delete_through,))
        if group is not None:
            group.number = self._next
            self._next += 1

    def read(self, after: int, weight_max: int) -> list[Group]:
        """Groups behind number `after`, in order: at least one if there is one, and then as long as they weigh little."""
        groups: list[Group] = []
        damaged: list[int] = []
        for number, weight, since, checksum, body in self._rows(
            "SELECT number, weight, since, checksum, body FROM groups WHERE number > ? ORDER BY number",
            (after,),
        ):
            try:
                groups.append(Group(_decode_body(checksum, body), since, number))
            except ValueError:
                damaged.append(number)
                continue
            weight_max -= weight
            if weight_max <= 0:
                break
        for number in damaged:
            self._set_aside(number)
        return groups

    def summary(self, after: int) -> Summary:
        """What there is behind group number `after`, and all dead letters."""
        with _mapped(self.path):
            return _summarise(self._db, after)

    def dead_letters(self, ids: Sequence[str] | None, limit: int) -> list[DeadLetter]:
        """Dead letters with these ids, or all; oldest first."""
        rows = self._rows("SELECT id, letter FROM dead_letters ORDER BY rowid")
        wanted = None if ids is None else set(ids)
        found: list[DeadLetter] = []
        for id_, letter in rows:
            if wanted is not None and id_ not in wanted:
                continue
            found.append(_decode_letter(letter))
            if len(found) == limit:
                break
        return found

    def requeue(self, letters: Sequence[DeadLetter], now: float) -> Group:
        """Make these dead letters a group at the end, that waits since `now` (Unix seconds)."""
        group = Group([letter.message for letter in letters], now)
        with self._transaction() as connection:
            _insert(connection, self._next, group)
            connection.executemany(
                "DELETE FROM dead_letters WHERE id = ?", [(letter.id,) for letter in letters]
            )
        group.number = self._next
        self._next += 1
        return group

    def discard(self, letters: Sequence[DeadLetter]) -> None:
        """Delete these dead letters."""
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM dead_letters WHERE id = ?", [(letter.id,) for letter in letters]
            )

    def make_room(self) -> None:
        """After SpoolFull: give back what the WAL takes, if the disk lets us."""
        with contextlib.suppress(SpoolError), _mapped(self.path):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def shrink(self) -> None:
        """Give pages that an outage has left free back to the file system, up to a hundred megabytes."""
        with contextlib.suppress(SpoolError), _mapped(self.path):
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            if free > _CHECKPOINT_PAGES:
                # A script: a statement without columns is stepped only once, and frees one page at each step.
                self._db.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")

    def start_over(self) -> None:
        """Throw everything away; all of it must be settled, and nothing damaged in it. A full disk may leave no other
        way to delete.
        """
        self.close()
        self._unlink()
        self.open()

    def recover(self, after: int = 0) -> tuple[Summary, Path]:
        """After SpoolDamaged: keep the damaged file under another name, and what can be read of it in a new one.

        Gives what the new file holds behind group number `after`, and where the old one is. When there is no room for
        the new one, the old one stands where it was.
        """
        self.close()
        aside = self.path.with_name(f"{self.path.stem}.damaged")
        while aside.exists():
            aside = aside.with_name(aside.name + "-")
        with _mapped(self.path):
            _rename(self.path, aside)
        try:
            return self._save_from(aside, after), aside
        except BaseException:
            self.close()
            with _mapped(self.path):
                self._unlink()
                _rename(aside, self.path)
            raise

    def _save_from(self, damaged: Path, after: int) -> Summary:
        self.open()
        with self._transaction() as connection:
            for table, row in _salvage(damaged):
                connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({','.join('?' * len(row))})", row)  # noqa: S608 - our own tables
            summary = _summarise(connection, after)
            (last,) = connection.execute("SELECT coalesce(max(number), 0) FROM groups").fetchone()
        self._next = max(self._next, last + 1)
        return summary

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(
                sqlite3.Error
            ):  # the last checkpoint failed: the WAL is read at the next open
                connection.close()

    def _unlink(self) -> None:
        for side in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + side).unlink(missing_ok=True)

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:  # a full disk or a fault let it be closed and not be opened again
            self.open()
        assert self._connection is not None
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        execute = connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA auto_vacuum = INCREMENTAL")
        (mode,) = execute("PRAGMA journal_mode = WAL").fetchone()
        assert mode == "wal", mode
        execute(f"PRAGMA synchronous = {self._sync}")
        execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT}")
        (found,) = execute("PRAGMA user_version").fetchone()
        if found > FORMAT:
            raise SpoolError(
                f"{self.path} has spool format {found}, this program knows {FORMAT}: upgrade it, or move the file away"
            )
        if found < FORMAT:
            for statement in _SCHEMA:
                execute(statement)
            execute(f"PRAGMA user_version = {FORMAT}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._db
        with _mapped(self.path):
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _rows(self, query: str, parameters: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        with _mapped(self.path), contextlib.closing(self._db.execute(query, parameters)) as cursor:
            yield from cursor

    def _set_aside(self, number: int) -> None:
        with self._transaction() as connection:
            (messages,) = connection.execute(
                "SELECT messages FROM groups WHERE number = ?", (number,)
            ).fetchone()
            connection.execute(
                "INSERT OR REPLACE INTO damaged SELECT number, messages, body FROM groups WHERE number = ?",
                (number,),
            )
            connection.execute("DELETE FROM groups WHERE number = ?", (number,))
        self.damaged_messages += messages


_SCHEMA: Final = (
    (
        "CREATE TABLE IF NOT EXISTS groups (number INTEGER PRIMARY KEY, messages INTEGER NOT NULL, weight INTEGER NOT NULL, "
        "since REAL NOT NULL, devices BLOB NOT NULL, checksum INTEGER NOT NULL, body BLOB NOT NULL)"
    ),
    (
        "CREATE TABLE IF NOT EXISTS dead_letters (id TEXT PRIMARY KEY, device TEXT NOT NULL, weight INTEGER NOT NULL, "
        "letter BLOB NOT NULL)"
    ),
    "CREATE TABLE IF NOT EXISTS damaged (number INTEGER PRIMARY KEY, messages INTEGER NOT NULL, body BLOB NOT NULL)",
)

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_messages: Final = msgspec.msgpack.Decoder(list[Message]).decode
_decode_letter: Final = msgspec.msgpack.Decoder(DeadLetter).decode
_decode_devices: Final = msgspec.msgpack.Decoder(list[tuple[str, str, int]]).decode


def _insert(connection: sqlite3.Connection, number: int, group: Group) -> None:
    body = _encode(group.messages)
    connection.execute(
        "INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            number,
            len(group.messages),
            group.weight,
            group.since,
            _encode([(*device, weight) for device, weight in group.devices.items()]),
            zlib.crc32(body),
            body,
        ),
    )


def _decode_body(checksum: int, body: bytes) -> list[Message]:
    """Raises ValueError when it is not what was written."""
    if zlib.crc32(body) != checksum:
        raise ValueError("checksum")
    messages = _decode_messages(body)
    if not messages:
        raise ValueError("empty")
    return messages


def _summarise(connection: sqlite3.Connection, after: int) -> Summary:
    summary = Summary()
    for messages, devices in connection.execute(
        "SELECT messages, devices FROM groups WHERE number > ?", (after,)
    ):
        summary.messages += messages
        for realm, device, weight in _decode_devices(devices):
            summary.devices[realm, device] += weight
    summary.dead_letters, summary.dead_weight = connection.execute(
        "SELECT count(*), coalesce(sum(weight), 0) FROM dead_letters"
    ).fetchone()
    return summary


def _salvage(path: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every row of a damaged file that can still be read: from the front, and from the back, up to the damage."""
    with contextlib.suppress(sqlite3.Error):
        connection = sqlite3.connect(path)
        with contextlib.closing(connection):
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            for table in ("groups", "dead_letters", "damaged"):
                for direction in ("ASC", "DESC"):
                    with contextlib.suppress(sqlite3.Error):
                        for row in connection.execute(f"SELECT * FROM {table} ORDER BY rowid {direction}"):  # noqa: S608 - our own tables
                            if table != "groups" or zlib.crc32(row[-1]) == row[-2]:
                                yield table, row


def _rename(path: Path, to: Path) -> None:
    """Move a database, and what of it is still in its WAL."""
    for side in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + side).rename(to.with_name(to.name + side))


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    """Foreign exceptions as ours."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        if primary == sqlite3.SQLITE_FULL:
            raise SpoolFull(f"spool {path}: the disk is full") from exc
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise SpoolDamaged(f"spool {path}: {exc}") from exc
        raise SpoolError(f"spool {path}: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise SpoolDamaged(f"spool {path}: {exc}") from exc
    except OSError as exc:
        raise SpoolError(f"spool {path}: {exc.strerror}") from exc
