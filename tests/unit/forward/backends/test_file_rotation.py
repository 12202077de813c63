"""Rotation of the file backend by size: no line lost, split or written twice, whatever the number of writers."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gateway
from gateway.forward.backends.file import FileBackend, FileSettings
from gateway.forward.message import Message

ROOT = str(Path(gateway.__file__).parents[1])
DEADLINE_S = 60


def message(number: int, payload: bytes = b"x" * 100) -> Message:
    return Message("r", "d", "d", None, "s", number, 0.0, payload)


def append(path: Path, batches: list[list[Message]], **settings: Any) -> None:
    async def run() -> None:
        sink = FileBackend("b", FileSettings(kind="file", path=str(path), **settings), "text/plain", Path())
        await sink.open()
        for batch in batches:
            await sink.deliver(batch)
        await sink.close()

    asyncio.run(run())


def numbers(path: Path) -> list[int]:
    return [int(json.loads(line)["sequence"]) for line in path.read_bytes().splitlines()]


def test_a_full_file_is_moved(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, [[message(number)] for number in range(1, 11)], rotate_bytes=1000, rotate_keep=3)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [
        "events.jsonl",
        "events.jsonl.1",
        "events.jsonl.2",
        "events.jsonl.3",
    ]
    kept = [number for file in reversed(files) for number in numbers(file)]
    assert kept == list(range(kept[0], 11))
    assert all(file.stat().st_size <= 1000 for file in files)


def test_a_batch_is_never_split_and_never_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, [[message(1), message(2), message(3)], [message(4)], [message(5)]], rotate_bytes=400)
    assert numbers(tmp_path / "events.jsonl.2") == [1, 2, 3]
    assert numbers(tmp_path / "events.jsonl.1") == [4]
    assert numbers(path) == [5]


def test_without_rotation_a_file_grows(tmp_path: Path) -> None:
    append(tmp_path / "events.jsonl", [[message(number)] for number in range(1, 11)])
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import asyncio, sys
from pathlib import Path
from gateway.forward.backends.file import FileBackend, FileSettings
from gateway.forward.message import Message

async def main(path, device):
    settings = FileSettings(kind="file", path=path, fsync="never", rotate_bytes=20_000, rotate_keep=1000)
    sink = FileBackend("b", settings, "text/plain", Path())
    await sink.open()
    for number in range(1, 301):
        await sink.deliver([Message("r", device, device, None, "s", number, 0.0, b"x" * 200)])
    await sink.close()

asyncio.run(main(*sys.argv[1:]))
"""


def test_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, path, device], env=os.environ | {"PYTHONPATH": ROOT}
                )
            )
            for device in "abc"
        ]
        assert [writer.wait(DEADLINE_S) for writer in writers] == [0, 0, 0]
    files = sorted(tmp_path.glob("events.jsonl.*"), key=lambda file: -int(file.suffix[1:]))
    found = [json.loads(line) for file in [*files, path] for line in file.read_bytes().splitlines()]
    assert len(files) > 10
    for device in "abc":
        assert [int(each["sequence"]) for each in found if each["device"] == device] == list(range(1, 301))
