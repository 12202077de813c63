"""Messages of a device that are not safe at the gateway yet: in memory, or in a file that outlives the process.

A message is put, and removed when the gateway has acknowledged (or finally refused) it. What is in the store when the
client opens it is sent first. Both stores are bounded by messages and bytes; a full one refuses, and loses nothing.

`FileStore` is SQLite in WAL mode. `put` returns once the message is committed with `synchronous = FULL`; commits of
messages that come together are one commit. Removals ride along with the next commit: after a crash in between, a message
that was acknowledged may be sent again, never lost. All of the file's work is done by one thread, and a copy of what
is stored stays in memory, so reading never waits. The file belongs to one client at a time, by a lock.
"""

import asyncio
import collections
import contextlib
import dataclasses
import fcntl
import os
import secrets
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from gateway.errors import DeviceError

__all__ = ["FileStore", "MemoryStore", "Store", "StoreFull", "Stored"]

MESSAGES_MAX: Final = 10_000
BYTES_MAX: Final = 16 * 1024 * 1024


class StoreFull(DeviceError):
    """A bound of the store is reached: wait for acknowledgements, or drop what is least worth sending."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A message. Numbers of one store grow and are never used twice."""

    number: int
    payload: bytes


class Store(Protocol):
    """What a client keeps its messages in."""

    @property
    def name(self) -> str:
        """Tells this store's numbers from those of any other, once open."""

    async def open(self) -> list[Stored]:
        """Make it usable; the messages left from before, in order. Raises DeviceError."""

    async def put(self, payload: bytes) -> Stored:
        """Keep a message. Raises StoreFull, or DeviceError when the file does not take it."""

    def remove(self, number: int) -> None:
        """The gateway has answered: forget the message."""

    async def close(self) -> None:
        """Write what is still to be written. Safe to repeat."""


class _Bounds:
    """What both stores count."""

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._messages_max = messages_max
        self._bytes_max = bytes_max
        self._sizes: dict[int, int] = {}
        self._bytes = 0

    def check(self, size: int) -> None:
        if len(self._sizes) >= self._messages_max or self._bytes + size > self._bytes_max:
            raise StoreFull(
                f"the store is full: {len(self._sizes)} messages, {self._bytes} bytes wait for the gateway"
            )

    def add(self, number: int, size: int) -> None:
        self._sizes[number] = size
        self._bytes += size

    def remove(self, number: int) -> bool:
        size = self._sizes.pop(number, None)
        self._bytes -= size or 0
        return size is not None


class MemoryStore:
    """Messages outlive a gateway that is away, and nothing else. `bytes_max` counts payloads."""

    def __init__(self, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._bounds = _Bounds(messages_max, bytes_max)
        self._number = 0
        self.name = secrets.token_hex(8)

    async def open(self) -> list[Stored]:
        """Nothing is left from before."""
        return []

    async def put(self, payload: bytes) -> Stored:
        """Keep a message. Raises StoreFull."""
        self._bounds.check(len(payload))
        self._number += 1
        self._bounds.add(self._number, len(payload))
        return Stored(self._number, payload)

    def remove(self, number: int) -> None:
        """Forget it."""
        self._bounds.remove(number)

    async def close(self) -> None:
        """Nothing to do."""


class FileStore:
    """Messages outlive the process, too. The file is made when it is not there, readable by its owner alone."""

    def __init__(
        self, path: Path | str, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX
    ) -> None:
        self._path = Path(path)
        self._bounds = _Bounds(messages_max, bytes_max)
        self._database: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._number = 0
        self._puts: collections.deque[tuple[Stored, asyncio.Future[None]]] = collections.deque()
        self._removed: list[int] = []
        self._committing: asyncio.Future[None] | None = None
        self.name = ""

    async def open(self) -> list[Stored]:
        """Open or make the file. Raises DeviceError, also when another client has it open."""
        self._thread = ThreadPoolExecutor(1, "device-store")
        try:
            left = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except (OSError, sqlite3.Error) as exc:
            self._release()
            raise DeviceError(f"the store {self._path} cannot be opened: {exc}") from exc
        for message in left:
            self._bounds.add(message.number, len(message.payload))
        return left

    async def put(self, payload: bytes) -> Stored:
        """Keep a message; returns when it is on disk. Raises StoreFull, or DeviceError when the disk does not take it.

        Cancelling takes the message back.
        """
        if self._thread is None:
            raise DeviceError(f"the store {self._path} is closed")
        self._bounds.check(len(payload))
        self._number += 1
        message = Stored(self._number, payload)
        self._bounds.add(message.number, len(payload))
        committed = asyncio.get_running_loop().create_future()
        self._puts.append((message, committed))
        self._commit_soon()
        try:
            await committed
        except asyncio.CancelledError:
            self.remove(message.number)
            raise
        return message

    def remove(self, number: int) -> None:
        """Forget it: on disk with the next commit."""
        if self._bounds.remove(number):
            self._removed.append(number)
            self._commit_soon()

    async def close(self) -> None:
        """Commit what is left and give the file free."""
        while self._committing is not None:
            await asyncio.wait({self._committing})
        self._release()

    def _commit_soon(self) -> None:
        """One commit at a time; what comes meanwhile is the next one."""
        if self._committing is not None or self._thread is None:
            return
        puts, self._puts = self._puts, collections.deque()
        removed, self._removed = self._removed, []
        self._committing = asyncio.get_running_loop().run_in_executor(
            self._thread, self._commit, [message for message, _ in puts], removed
        )
        self._committing.add_done_callback(lambda done: self._committed(done, puts, removed))

    def _committed(
        self,
        done: "asyncio.Future[None]",
        puts: "collections.deque[tuple[Stored, asyncio.Future[None]]]",
        removed: list[int],
    ) -> None:
        self._committing = None
        error = None if done.cancelled() else done.exception()
        for message, committed in puts:
            if error is not None:
                self._bounds.remove(message.number)  # and it stands in no transaction
            if committed.done():
                continue
            if error is None:
                committed.set_result(None)
            else:
                committed.set_exception(
                    DeviceError(f"the store {self._path} does not take a message: {error}")
                )
        if error is not None:
            self._removed = removed + self._removed  # with the next commit, then
        if self._puts or (self._removed and error is None):
            self._commit_soon()

    # In the thread

    def _open(self) -> list[Stored]:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # A file of its own: SQLite drops its own locks when any descriptor of the database is closed.
        self._lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another client has it open: give each client a file of its own") from None
        self._database = database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE IF NOT EXISTS store (name TEXT NOT NULL)")
        database.execute(
            "CREATE TABLE IF NOT EXISTS messages (number INTEGER PRIMARY KEY AUTOINCREMENT, payload BLOB NOT NULL)"
        )
        row = database.execute("SELECT name FROM store").fetchone()
        if row is None:
            row = (secrets.token_hex(8),)
            database.execute("INSERT INTO store VALUES (?)", row)
        self.name = row[0]
        last = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetchone()
        self._number = last[0] if last else 0
        return [
            Stored(*row) for row in database.execute("SELECT number, payload FROM messages ORDER BY number")
        ]

    def _commit(self, messages: list[Stored], removed: list[int]) -> None:
        database = self._database
        assert database is not None
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany(
                "INSERT INTO messages VALUES (?, ?)",
                [(message.number, message.payload) for message in messages],
            )
            database.executemany("DELETE FROM messages WHERE number = ?", [(number,) for number in removed])
            database.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):  # a full disk may have ended the transaction already
                database.execute("ROLLBACK")
            raise

    def _release(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
