"""JSON Lines on disk or on stdout: one CloudEvent per line.

Theory of operation. Several processes append to one file, so each batch is written under an exclusive flock, as one
append of whole lines. Under the lock three things are put right: a file that was moved away or deleted is opened
anew by its name (log rotation); a last line that a killed writer left unfinished is removed, it was never
acknowledged; and what a failed write left behind (disk full) is cut off again before the lock is released. So
readers see whole lines, and a batch is there as a whole or refused as a whole. fsync comes after the lock is
released: it covers everything in the file, and the others can write meanwhile.

Rotation by size happens under the lock too, before a batch that would not fit: `events.jsonl` becomes
`events.jsonl.1`, that one `.2`, and so on; the oldest is removed. Who waited for the lock of the old file finds that
the name means another now, and opens that. A crash in the middle leaves a gap in the numbers, and no line lost.

Writing, locking and fsync block, so they run in one thread per backend and route, in order.
"""

import asyncio
import contextlib
import fcntl
import os
import select
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from gateway.errors import BackendUnavailable
from gateway.files import sync_folder
from gateway.forward.message import Message, encode_message
from gateway.wire.cloudevents import EVENT_START, payload_kind

__all__ = ["FileBackend", "FileSettings", "LineAppender"]

STDOUT: Final = "-"
STDOUT_FD: Final = 1


def _resolve_path(path: str, info: ValidationInfo) -> str:
    if path == STDOUT:
        return path
    context = info.context if isinstance(info.context, dict) else {}
    return str((Path(context.get("base", ".")) / path).absolute())


class FileSettings(BaseModel):
    """`[backends.NAME]` with `kind = "file"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["file"]
    path: Annotated[
        str,
        Field(
            min_length=1,
            description="The file that lines are appended to; `-` is stdout. Its folder must exist.",
        ),
        AfterValidator(_resolve_path),
    ]
    fsync: Annotated[
        Literal["batch", "never"],
        Field(
            description="`batch`: a message is acknowledged when it is on the disk. `never`: when the kernel has it, "
            "which a crash of the program survives and a loss of power does not."
        ),
    ] = "batch"
    rotate_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="A file that would grow over this many bytes is moved to `PATH.1` and a new one begun. 0: never; "
            "then logrotate or the like may move it. A batch is never split, so 1 MiB at least is sensible.",
        ),
    ] = 0
    rotate_keep: Annotated[
        int, Field(ge=1, le=1000, description="How many moved files are kept; the oldest is removed.")
    ] = 10

    @model_validator(mode="after")
    def _stdout_does_not_rotate(self) -> Self:
        if self.path == STDOUT and self.rotate_bytes:
            raise ValueError("rotate_bytes has no effect on stdout: remove it")
        return self


class FileBackend:
    """The sink of one route in one process.

    `stdout_lock` is a file that all processes which write to this stdout lock; it is not used for another path.
    """

    def __init__(self, name: str, settings: FileSettings, content_type: str, stdout_lock: Path) -> None:
        self._name = name
        self._path = settings.path
        self._content_type = content_type
        self._kind = payload_kind(content_type)
        sync = os.fsync if settings.fsync == "batch" else None
        if settings.path == STDOUT:
            self._appender = LineAppender(_LockedStdout(stdout_lock), sync)
        else:
            file = _LockedFile(Path(settings.path), settings.rotate_bytes, settings.rotate_keep)
            self._appender = LineAppender(file, sync)
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Raises BackendUnavailable when the file cannot be opened now; `deliver` tries again."""
        await self._in_thread(self._appender.open)

    async def deliver(self, batch: Sequence[Message]) -> None:
        """Append the batch, and return when the fsync policy is met. Raises BackendUnavailable: nothing was taken,
        or it was written and fsync failed. Cancelling it does not stop the thread: the batch may still be written.
        """
        lines = bytearray()  # not a list of lines to join, which would hold the batch twice
        for message in batch:
            lines += encode_message(message, self._content_type, self._kind)
            lines += b"\n"
        await self._in_thread(self._appender.append, lines)

    async def close(self) -> None:
        """Close after whatever the thread is doing. Closing twice is allowed."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._appender.close)
        finally:
            thread.shutdown(wait=False)

    async def _in_thread(self, call: Callable[..., None], *args: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"backend-{self._name}")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
        except OSError as exc:
            where = "stdout" if self._path == STDOUT else self._path
            raise BackendUnavailable(
                f"backend {self._name}: cannot write to {where}: {exc.strerror}"
            ) from exc


class LineAppender:
    """Appends whole lines, all of them or none. Blocking; used by one thread at a time. Raises OSError."""

    def __init__(self, target: "_LockedFile | _LockedStdout", sync: Callable[[int], None] | None) -> None:
        self._target = target
        self._sync = sync

    def open(self) -> None:
        """Try whether the target can be opened and locked."""
        with self._target.locked():
            pass

    def append(self, lines: bytes | bytearray) -> None:
        with self._target.locked(len(lines)) as fd:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
            start = os.lseek(fd, 0, os.SEEK_END) if regular else 0
            try:
                _write_whole(fd, lines)
            except OSError:
                if regular:
                    os.ftruncate(fd, start)
                raise
        if self._sync and regular:
            self._sync(fd)

    def close(self) -> None:
        self._target.close()


class _LockedFile:
    """A file that is found by its name each time it is locked."""

    def __init__(self, path: Path, rotate_bytes: int = 0, rotate_keep: int = 1) -> None:
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._rotate_keep = rotate_keep
        self._fd: int | None = None

    @contextlib.contextmanager
    def locked(self, adding: int = 0) -> Iterator[int]:
        """The open and locked file, with room for `adding` bytes before it has to be rotated."""
        while True:
            fd = self._fd if self._fd is not None else self._open()
            with _flock(fd):
                if _is_at(fd, self._path):
                    _drop_torn_line(fd)
                    if not self._is_over(fd, adding):
                        yield fd
                        return
                    self._rotate()
            self.close()  # rotated away: the next round opens what the name means now

    def _is_over(self, fd: int, adding: int) -> bool:
        if not self._rotate_bytes:
            return False
        state = os.fstat(fd)
        return (
            stat.S_ISREG(state.st_mode) and state.st_size > 0 and state.st_size + adding > self._rotate_bytes
        )

    def _rotate(self) -> None:
        for number in range(self._rotate_keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                self._numbered(number).replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))
        sync_folder(self._path.parent)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _open(self) -> int:
        # Append mode as well as the lock: who writes here without the lock is at least not written over.
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd = os.open(self._path, flags)
        except FileNotFoundError:
            # Readers of the events need not be the gateway's user: the group may read, the umask has the last word.
            self._fd = os.open(self._path, flags | os.O_CREAT, 0o640)
            sync_folder(self._path.parent)
        return self._fd


class _LockedStdout:
    """Stdout, which processes share, locked through a file, since a pipe or a terminal has no lock of its own."""

    def __init__(self, lock_path: Path) -> None:
        self._lock = _LockedFile(lock_path)

    @contextlib.contextmanager
    def locked(self, adding: int = 0) -> Iterator[int]:  # noqa: ARG002 -- stdout has no size
        with self._lock.locked():
            yield STDOUT_FD

    def close(self) -> None:
        self._lock.close()


@contextlib.contextmanager
def _flock(fd: int) -> Iterator[None]:
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _write_whole(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # a stdout that somebody made non-blocking
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def _drop_torn_line(fd: int) -> None:
    """Remove an unfinished event at the end of the file; anything else that is unfinished gets its line end."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    end = os.lseek(fd, 0, os.SEEK_END)
    if end == 0 or os.pread(fd, 1, end - 1) == b"\n":
        return
    start = _last_line_start(fd, end)
    if EVENT_START.startswith(os.pread(fd, len(EVENT_START), start)):
        os.ftruncate(fd, start)
    else:
        os.write(fd, b"\n")


def _last_line_start(fd: int, end: int) -> int:
    while end:
        start = max(0, end - _BLOCK_BYTES)
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


_BLOCK_BYTES: Final = 64 * 1024
