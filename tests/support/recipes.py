"""The recipes of docs/devices as programs: a folder with the files of a page, and a shell that runs its commands."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, NoReturn

import pytest

from gateway.cli.bundle import Access
from gateway.cli.recipes import EXAMPLE, blocks, recipe
from gateway.registry.sealing import Key
from tests.support.gateway import Device

__all__ = ["Recipe", "access_for", "free_port", "missing", "need_header", "need_program", "python313"]

RUN_S: Final = 100
ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = {
    "cc": "gcc",
    "curl": "curl",
    "gnutls-cli": "gnutls-bin",
    "go": "golang-go",
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "node": "nodejs",
    "openssl": "openssl",
    "mbedtls/ssl.h": "libmbedtls-dev",
    "wolfssl/ssl.h": "libwolfssl-dev",
}
"""Where Debian has them."""


def missing(what: str) -> NoReturn:
    """A peer is not there: skipped visibly at home, a failure where everything should be installed."""
    text = f"{what} is not installed: apt-get install {PACKAGES[what]}"
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


def need_program(name: str) -> str:
    """The path of a program, if need be from where Debian keeps servers."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin") or missing(name)


def need_header(name: str) -> None:
    """See that a C library can be compiled against."""
    if not (Path("/usr/include") / name).exists():
        missing(name)


@functools.cache
def python313() -> str:
    """A Python whose `ssl` has PSK. Debian 12 has none, so that it is never a failure."""
    for candidate in (
        "python3.13",
        "python3.14",
        *sorted(map(str, Path.home().glob(".pyenv/versions/3.1[3-9]*/bin/python3"))),
    ):
        with contextlib.suppress(OSError):
            asked = subprocess.run(
                [candidate, "-c", "import ssl, sys; assert ssl.HAS_PSK; print(sys.executable)"],
                capture_output=True,
                text=True,
                check=False,
            )
            if asked.returncode == 0:
                return asked.stdout.strip()
    pytest.skip("no Python 3.13 with PSK in its ssl module")


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def access_for(device: Device, port: int, host: str = "127.0.0.1") -> Access:
    """A device of the tests, at a gateway of this host."""
    return dataclasses.replace(
        EXAMPLE,
        device=device.identity,
        identity=device.identity,
        key=Key(bytes.fromhex(device.key)),
        host=host,
        port=port,
    )


class Recipe:
    """A page, filled in for a device, in a folder of its own.

    Its commands find `gatewayctl`, `python3` and, when there is one, `python3.13`. What stands in `replace` are ports of
    this machine that the page names and a test cannot know to be free.
    """

    def __init__(
        self, name: str, access: Access, folder: Path, replace: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.commands = ""
        text = recipe(name, access)
        for old, new in (replace or {}).items():
            assert old in text
            text = text.replace(old, new)
        folder.mkdir(parents=True)
        for block in blocks(text):
            if block.file:
                (folder / block.file).write_text(block.text)
            elif block.language == "sh":
                self.commands += block.text
        self._environment = os.environ | {
            "PATH": f"{self._programs()}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GOCACHE": str(folder / "go-cache"),
            "HOME": str(folder),
        }

    def run(self, *commands: str) -> str:
        """Run its commands, or others in their place; what they printed. They must end with 0."""
        done = self.attempt(*commands)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def attempt(self, *commands: str) -> subprocess.CompletedProcess[str]:
        """The same, however they end."""
        return subprocess.run(
            ["/bin/sh", "-eu", "-c", "\n".join(commands) or self.commands],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=RUN_S,
            text=True,
            check=False,
        )

    def _programs(self) -> Path:
        folder = self.folder / "bin"
        folder.mkdir()
        _script(folder / "gatewayctl", f'exec {sys.executable} -m gateway "$@"')
        _script(folder / "python3", f'exec {sys.executable} "$@"')
        with contextlib.suppress(pytest.skip.Exception):
            _script(folder / "python3.13", f'PYTHONPATH={self._pure_modules()} exec {python313()} "$@"')
        return folder

    def _pure_modules(self) -> Path:
        """Modules without compiled parts, lent to another Python."""
        folder = self.folder / "modules"
        folder.mkdir()
        found = importlib.util.find_spec("paho")
        if found is not None and found.submodule_search_locations:
            (folder / "paho").symlink_to(next(iter(found.submodule_search_locations)))
        return folder


def _script(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o700)
