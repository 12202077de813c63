import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from pydantic import ValidationError

import gateway
from gateway.errors import BackendUnavailable
from gateway.forward.backends.file import FileBackend, FileSettings
from gateway.forward.message import Message
from tests.support.capabilities import needed_small_disk

DEADLINE_S = 60.0


def message(number: int, payload: bytes = b"x", device: str = "d") -> Message:
    return Message("default", device, device, None, "session", number, 0.0, payload)


def backend(path: Path | str, lock: Path = Path("/nonexistent"), **settings: Any) -> FileBackend:
    return FileBackend("events", FileSettings(kind="file", path=str(path), **settings), "text/plain", lock)


async def append(path: Path | str, *batches: list[Message], **settings: Any) -> None:
    sink = backend(path, **settings)
    await sink.open()
    try:
        for batch in batches:
            await sink.deliver(batch)
    finally:
        await sink.close()


def events(path: Path) -> list[dict[str, Any]]:
    """Every line is whole, or this raises."""
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def wait_until_larger(path: Path, size: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while path.stat().st_size <= size:
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def test_lines_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    asyncio.run(append(path, [message(1, b"a\xc3\xa9"), message(2, b"")]))
    asyncio.run(append(path, [message(3, b"two\tparts")]))
    assert [(event["sequence"][-1], event["data"]) for event in events(path)] == [
        ("1", "aé"),
        ("2", ""),
        ("3", "two\tparts"),
    ]
    assert path.stat().st_mode & 0o027 == 0


def test_close_twice_and_after_a_failed_open(tmp_path: Path) -> None:
    async def test() -> None:
        sink = backend(tmp_path / "missing" / "events.jsonl")
        await sink.close()
        with pytest.raises(BackendUnavailable) as caught:
            await sink.open()
        assert str(caught.value) == (
            f"backend events: cannot write to {tmp_path}/missing/events.jsonl: No such file or directory"
        )
        await sink.close()
        await sink.close()

    asyncio.run(test())
    for thread in threading.enumerate():
        if thread.name.startswith("backend-"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="Is a directory"):
        asyncio.run(append(tmp_path, []))


def test_a_named_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        asyncio.run(append(path, [message(1), message(2)]))
        assert [json.loads(line)["sequence"][-1] for line in pipe] == ["1", "2"]


class TestSettings:
    def test_path_is_relative_to_the_configuration(self, tmp_path: Path) -> None:
        read = FileSettings.model_validate({"kind": "file", "path": "a/b.jsonl"}, context={"base": tmp_path})
        assert read.path == str(tmp_path / "a/b.jsonl")
        assert (
            FileSettings.model_validate({"kind": "file", "path": "-"}, context={"base": tmp_path}).path == "-"
        )
        assert FileSettings(kind="file", path="b").path == str(Path("b").absolute())

    def test_no_path(self) -> None:
        with pytest.raises(ValidationError):
            FileSettings(kind="file", path="")


class TestFsync:
    """The profile hook of Python sees calls of C functions; it watches the backend's thread do its real work."""

    @staticmethod
    def calls(path: Path, batches: int, **settings: Any) -> list[str]:
        seen: list[str] = []
        watched = {os.write: "write", os.fsync: "fsync", fcntl.flock: "flock"}

        def watch(_frame: FrameType, event: str, function: object) -> None:
            if event == "c_call" and function in watched:
                seen.append(watched[function])

        threading.setprofile(watch)
        try:
            asyncio.run(append(path, *([message(1), message(2)] for _ in range(batches)), **settings))
        finally:
            threading.setprofile(None)
        return seen

    def test_batch(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.touch()
        batch = ["flock", "write", "flock", "fsync"]
        assert self.calls(path, 3, fsync="batch") == ["flock", "flock", *batch * 3]

    def test_never(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.touch()
        assert self.calls(path, 3, fsync="never") == ["flock", "flock", *["flock", "write", "flock"] * 3]

    def test_a_new_file_syncs_its_folder(self, tmp_path: Path) -> None:
        assert self.calls(tmp_path / "events.jsonl", 0)[0] == "fsync"

    def test_default_is_batch(self) -> None:
        assert FileSettings(kind="file", path="x").fsync == "batch"


class TestUnfinishedLines:
    def test_an_unfinished_event_is_removed(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        asyncio.run(append(path, [message(1, b"w" * 100_000), message(2, b"x" * 200_000)]))
        whole = path.read_bytes()
        first = whole.index(b"\n") + 1
        for end in (first + 1, first + 20, first + 21, first + 400, len(whole) - 1):
            path.write_bytes(whole[:end])
            asyncio.run(append(path, [message(3)]))
            assert [event["sequence"][-1] for event in events(path)] == ["1", "3"], end

    def test_a_first_line_that_is_unfinished(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.write_bytes(b'{"specversion":"1.0","id":"')
        asyncio.run(append(path, [message(1)]))
        assert len(events(path)) == 1

    def test_what_is_not_ours_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.write_bytes(b'{"by": "hand"}\n{"no": "line end"}')
        asyncio.run(append(path, [message(1)]))
        assert [len(event) for event in events(path)[:2]] == [1, 1]
        assert len(events(path)) == 3


class TestRotation:
    @pytest.mark.parametrize("remove", [True, False])
    def test_a_file_that_went_away_is_made_anew(self, tmp_path: Path, remove: bool) -> None:
        path, old = tmp_path / "events.jsonl", tmp_path / "events.jsonl.1"

        async def test() -> None:
            sink = backend(path)
            await sink.open()
            await sink.deliver([message(1)])
            if remove:
                path.unlink()
            else:
                path.rename(old)
            await sink.deliver([message(2)])
            await sink.close()

        asyncio.run(test())
        assert [event["sequence"][-1] for event in events(path)] == ["2"]
        if not remove:
            assert [event["sequence"][-1] for event in events(old)] == ["1"]

    def test_truncated_in_place(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"

        async def test() -> None:
            sink = backend(path)
            await sink.open()
            await sink.deliver([message(1)])
            os.truncate(path, 0)
            await sink.deliver([message(2)])
            await sink.close()

        asyncio.run(test())
        assert [event["sequence"][-1] for event in events(path)] == ["2"]


class TestEventLoop:
    def test_goes_on_while_another_process_holds_the_lock(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.touch()

        async def test() -> None:
            sink = backend(path)
            await sink.open()
            with path.open("rb") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                async with asyncio.TaskGroup() as tasks:
                    delivering = tasks.create_task(sink.deliver([message(1)]))
                    for _ in range(1000):
                        await asyncio.sleep(0)
                    assert not delivering.done()
                    assert path.read_bytes() == b""
                    fcntl.flock(other, fcntl.LOCK_UN)
            assert len(events(path)) == 1
            await sink.close()

        asyncio.run(asyncio.wait_for(test(), DEADLINE_S))

    def test_a_cancelled_delivery_is_finished_before_the_next_and_before_close(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.touch()

        async def test() -> None:
            sink = backend(path)
            await sink.open()
            with path.open("rb") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                async with asyncio.TaskGroup() as tasks:
                    first = tasks.create_task(sink.deliver([message(1)]))
                    await asyncio.sleep(0)
                    first.cancel()
                    await asyncio.sleep(0)
                    tasks.create_task(sink.deliver([message(2)]))
                    await asyncio.sleep(0)
                    fcntl.flock(other, fcntl.LOCK_UN)
            await sink.close()

        asyncio.run(asyncio.wait_for(test(), DEADLINE_S))
        assert [event["sequence"][-1] for event in events(path)] in (["1", "2"], ["2"])


# Several processes

WRITER = """
import asyncio, os, sys
from pathlib import Path
from gateway.errors import BackendUnavailable
from gateway.forward.backends.file import FileBackend, FileSettings
from gateway.forward.message import Message

async def main(path, lock, fsync, device, batches, batch, size):
    sink = FileBackend("events", FileSettings(kind="file", path=path, fsync=fsync), "text/plain", Path(lock))
    await sink.open()
    number = 0
    for turn in range(batches):
        messages = []
        for each in range(1 + turn % batch):
            number += 1
            messages.append(Message("r", device, device, None, "s", number, 0.0, b"x" * (number * 37 % size)))
        try:
            await sink.deliver(messages)
        except BackendUnavailable as exc:
            print(exc, file=sys.stderr)
            return 3
    await sink.close()
    return 0

path, lock, fsync, device, batches, batch, size = sys.argv[1:]
sys.exit(asyncio.run(main(path, lock, fsync, device, int(batches), int(batch), int(size))))
"""


def limited_to(file_bytes: int) -> str:
    """Code that limits the size of files for the rest of a program, but not for what runs at its exit."""
    return f"""
import atexit, resource
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, before[1]))
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, before)
"""


TWO_WRITERS = """
import asyncio, sys
from pathlib import Path
from gateway.errors import BackendUnavailable
from gateway.forward.backends.file import FileBackend, FileSettings
from gateway.forward.message import Message

async def main(path):
    a, b = (FileBackend(name, FileSettings(kind="file", path=path), "text/plain", Path()) for name in "ab")
    await a.open()
    await b.open()
    await a.deliver([Message("r", "a", "a", None, "s", 1, 0.0, b"x")])
    await b.deliver([Message("r", "b", "b", None, "s", 1, 0.0, b"x")])
    try:
        await a.deliver([Message("r", "a", "a", None, "s", 2, 0.0, b"x" * 10_000)])
    except BackendUnavailable:
        await a.deliver([Message("r", "a", "a", None, "s", 3, 0.0, b"x")])
    await a.close()
    await b.close()

asyncio.run(main(sys.argv[1]))
"""

ROOT = str(Path(gateway.__file__).parents[1])


@contextlib.contextmanager
def writer(
    path: Path | str,
    lock: Path | str = "/nonexistent",
    *,
    device: str = "d",
    batches: int = 200,
    batch: int = 20,
    size: int = 1000,
    **popen: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [path, lock, "never", device, batches, batch, size]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WRITER, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": ROOT},
        **popen,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def assert_whole_and_in_order(found: list[dict[str, Any]], devices: int, batches: int, batch: int) -> None:
    per_device = sum(1 + turn % batch for turn in range(batches))
    numbers: dict[str, list[int]] = {}
    for event in found:
        numbers.setdefault(event["device"], []).append(int(event["sequence"]))
        assert event["data"] == "x" * len(event["data"])
    assert len(numbers) == devices
    for listed in numbers.values():
        assert listed == list(range(1, per_device + 1))


def test_processes_that_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writer(path, device=f"d{each}", size=9000)) for each in range(4)]
        assert [each.wait(DEADLINE_S) for each in writers] == [0] * 4
    assert_whole_and_in_order(events(path), 4, 200, 20)


def test_a_killed_writer_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.touch()
    for grown in (1 << 20, 5 << 20, 9 << 20):
        with writer(path, batches=10**6, batch=400, size=60_000) as process:
            wait_until_larger(path, grown)
            process.send_signal(signal.SIGKILL)
            assert process.wait(DEADLINE_S) == -signal.SIGKILL
        asyncio.run(append(path, [message(1, b"after")]))
        assert events(path)[-1]["data"] == "after"


class TestStdout:
    def test_processes_that_share_a_pipe(self, tmp_path: Path) -> None:
        lock = tmp_path / "stdout.lock"
        read, write = os.pipe()
        with contextlib.ExitStack() as stack:
            for each in range(3):
                stack.enter_context(writer("-", lock, device=f"d{each}", size=9000, stdout=write))
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                found = [json.loads(line) for line in pipe]
        assert_whole_and_in_order(found, 3, 200, 20)

    def test_a_pipe_that_does_not_block(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        with writer("-", tmp_path / "lock", size=9000, stdout=write):
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                found = [json.loads(line) for line in pipe]
        assert_whole_and_in_order(found, 1, 200, 20)

    def test_processes_that_share_a_redirected_file(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        with path.open("wb") as out, contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(writer("-", tmp_path / "lock", device=f"d{each}", stdout=out))
                for each in range(3)
            ]
            assert [each.wait(DEADLINE_S) for each in writers] == [0] * 3
        assert_whole_and_in_order(events(path), 3, 200, 20)

    def test_nobody_reads(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.close(read)
        with writer("-", tmp_path / "lock", stdout=write, stderr=subprocess.PIPE) as process:
            os.close(write)
            _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 3
        assert said == b"backend events: cannot write to stdout: Broken pipe\n"


class TestFullDisk:
    def test_file_size_limit(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        done = subprocess.run(
            [sys.executable, "-c", limited_to(50_000) + WRITER, path, "/", "batch", "d", "200", "20", "1000"],
            env=os.environ | {"PYTHONPATH": ROOT},
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 3
        assert done.stderr.decode() == f"backend events: cannot write to {path}: File too large\n"
        assert 30_000 < path.stat().st_size <= 50_000
        numbers = [int(event["sequence"]) for event in events(path)]
        assert numbers == list(range(1, len(numbers) + 1))
        after_each_batch = itertools.accumulate(1 + turn % 20 for turn in range(200))
        assert len(numbers) in after_each_batch, "a batch is there as a whole or not at all"

    def test_what_others_wrote_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        done = subprocess.run(
            [sys.executable, "-c", limited_to(5_000) + TWO_WRITERS, path],
            env=os.environ | {"PYTHONPATH": ROOT},
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0
        assert [event["device"] for event in events(path)] == ["a", "b", "a"]

    def test_small_disk(self, tmp_path: Path) -> None:
        with needed_small_disk(tmp_path / "disk", 128 << 10) as filler:
            path = filler.with_name("events.jsonl")
            filler.write_bytes(bytes(64 << 10))

            async def test() -> None:
                sink = backend(path)
                await sink.open()
                with pytest.raises(BackendUnavailable) as caught:
                    await fill_up(sink)
                cause = caught.value.__cause__
                assert isinstance(cause, OSError)
                assert cause.errno == errno.ENOSPC
                before = events(path)
                assert len(before) % 2 == 0
                assert len(before) > 20
                filler.unlink()
                await sink.deliver([message(1, b"again")])
                assert events(path)[:-1] == before
                await sink.close()

            asyncio.run(test())


async def fill_up(sink: FileBackend) -> None:
    for number in range(1, 1000):
        await sink.deliver([message(number, b"x" * 700), message(number, b"y" * 700)])
