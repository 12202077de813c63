"""What a machine must offer for some tests: a missing thing skips visibly at home and fails where `CI` is set."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["Unavailable", "missing", "small_disk"]


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
    directory.mkdir()
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
