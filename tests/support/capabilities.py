"""What a machine must offer for some tests: a missing thing skips visibly at home and fails where `CI` is set."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["FailingDisk", "Unavailable", "failing_disk", "fill", "missing", "needed_small_disk", "small_disk"]


class Unavailable(Exception):
    """This machine does not have what is asked for; the text says why."""


def missing(what: str) -> NoReturn:
    """Skip this test, or fail it when CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set")
    pytest.skip(what)


@contextlib.contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[None]:
    """A file system of its own at `directory`, which fills up soon. Raises Unavailable: only root may make one."""
    if os.geteuid() != 0:
        raise Unavailable("a small disk needs root to mount it")
    directory.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", directory],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextlib.contextmanager
def needed_small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A small disk without which the test cannot be; gives the name of a file that is there to `fill` it."""
    try:
        with small_disk(directory, size_bytes):
            yield directory / "ballast"
    except Unavailable as exc:
        missing(str(exc))


def fill(ballast: Path) -> None:
    """Leave no byte on its disk."""
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


class FailingDisk:
    """An ext4 file system on a loop device, which can fail as one does whose disk gave errors: it is read-only at once."""

    def __init__(self, image: Path, directory: Path) -> None:
        self._image = image
        self._directory = directory

    def mount(self) -> None:
        _mount("-o", "loop", self._image, self._directory)

    def fail(self) -> None:
        """Make it read-only, for those too who write just now: what ext4 does when it aborts its journal."""
        _mount("-o", "remount,abort", self._directory)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self._directory], check=True)

    def repair(self) -> None:
        """As the administrator does, when nobody uses it any more: unmount it, check it, mount it again."""
        subprocess.run(["umount", self._directory], check=True)
        checked = subprocess.run(["e2fsck", "-fy", self._image], capture_output=True, check=False)
        assert checked.returncode in (0, 1), checked.stdout  # 1: it was repaired
        self.mount()


@contextlib.contextmanager
def failing_disk(directory: Path, size_bytes: int = 64 << 20) -> Iterator[FailingDisk]:
    """A disk of its own at `directory`. Raises Unavailable: only root may make one."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        raise Unavailable("a disk that fails needs root and e2fsprogs")
    directory.mkdir(exist_ok=True)
    image = directory.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    disk = FailingDisk(image, directory)
    disk.mount()
    try:
        yield disk
    finally:
        disk.unmount()


def _mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"cannot mount here: {done.stderr.strip()}")
