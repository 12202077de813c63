"""The folder with the spools of one route, and who owns which of them.

Each spool is a database `NAME.db` beside an empty `NAME.lock`. Who holds the flock on the lock file owns the spool; the
kernel releases it when the process ends, however it ends, so a spool whose lock can be had has no owner. The lock is on
a file of its own because SQLite keeps POSIX locks on the database, and closing any other descriptor of a file drops those.
A spool is removed under its lock, so whoever gets a lock looks whether the name still means that file.
"""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Container
from pathlib import Path
from typing import Final

from gateway.files import sync_folder
from gateway.forward.message import UUID7_RANDOM_BITS, uuid7

__all__ = ["Claim", "SpoolFolder"]

_SIDE_FILES: Final = ("", "-wal", "-shm", "-journal")


class Claim:
    """One spool that this process owns until `release` or `remove`."""

    def __init__(self, database: Path, lock_fd: int) -> None:
        self.database: Final = database
        self.name: Final = database.stem
        self.is_new = False
        """Whether it was made by who has claimed it."""
        self._lock_fd: int | None = lock_fd

    def release(self) -> None:
        """Leave the spool to whoever takes it next. Releasing twice is allowed."""
        if self._lock_fd is not None:
            fd, self._lock_fd = self._lock_fd, None
            os.close(fd)

    def remove(self) -> None:
        """Delete the spool; it must be closed. Raises OSError: then it is released all the same."""
        try:
            for side in _SIDE_FILES:
                self.database.with_name(self.database.name + side).unlink(missing_ok=True)
            self.database.with_suffix(".lock").unlink(missing_ok=True)
        finally:
            self.release()

    def give_up(self) -> None:
        """It cannot be opened. One that was made for that is deleted, as a full disk would see many; another is left."""
        with contextlib.suppress(OSError):
            if self.is_new:
                self.remove()
        self.release()


class SpoolFolder:
    """The spools of one route. All methods block, shortly, and raise OSError."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path

    def take(self, passing_over: Container[str] = ()) -> Claim:
        """A spool to write to: one that has no owner, or else a new one."""
        if not self.path.is_dir():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for above in (self.path.parent, self.path.parent.parent):
                sync_folder(above)
        return self.ownerless(passing_over) or self._create()

    def ownerless(self, passing_over: Container[str] = ()) -> Claim | None:
        """Claim a spool that has no owner, the oldest first; None when all have one, or a name that is passed over."""
        try:
            locks = sorted(self.path.glob("*.lock"))
        except FileNotFoundError:
            return None
        for lock in locks:
            claim = None if lock.stem in passing_over else _claim(lock)
            if claim is not None:
                return claim
        return None

    def _create(self) -> Claim:
        while True:
            lock = self.path / f"{uuid7(time.time(), secrets.randbits(UUID7_RANDOM_BITS))}.lock"
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            claim = _claim(lock)
            if claim is not None:  # else another process saw it without an owner, and was faster
                claim.is_new = True
                sync_folder(self.path)
                return claim


def _claim(lock: Path) -> Claim | None:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), lock.stat()):
            return Claim(lock.with_suffix(".db"), fd)
    except (BlockingIOError, FileNotFoundError):
        pass  # it has an owner, or its owner has just removed it
    os.close(fd)
    return None
