"""Upgrade: the supervisor becomes another image of the program, with its sockets and children, under the same process id.

Theory of operation. Nothing is stopped before the new program has shown that it can do it: it is started as a child with
`check-config --for-upgrade`, imports all of itself, reads the configuration, and looks at the registry and the replica.
Then the supervisor lets go of its channels, writes what it knows into a memory file, and replaces itself by execve(2);
sockets, the lock of the data folder and the channels stay open over that, and children stay children. Signals are
blocked from before execve until the new image listens to them, so that none ends it. When execve fails the channels are
taken back and everything goes on.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from gateway.errors import ConfigurationError
from gateway.registry.notices import Changed
from gateway.server.control.messages import FollowerStatus, Message
from gateway.server.processes.sockets import HandedListener
from gateway.server.supervision.children import HandedChild
from gateway.telemetry.aggregate import Snapshot

__all__ = [
    "FORMAT",
    "FORMAT_VARIABLE",
    "Handover",
    "Program",
    "become",
    "preflight",
    "receive",
    "unblock_signals",
]

FORMAT: Final = 1
"""Of `Handover`, and of what supervisor and children say to each other: a program that knows another one is refused."""
FORMAT_VARIABLE: Final = "PSKGW_HANDOVER_FORMAT"
_VARIABLE: Final = "PSKGW_HANDOVER"
_PREFLIGHT_S: Final = 60.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Program:
    """How this program is run, and how it checks whether it could take over. `code` is the folder of the package."""

    run: tuple[str, ...]
    check: tuple[str, ...]
    code: Path
    stamp: str
    """of the code when this image was started"""

    @property
    def has_changed(self) -> bool:
        """Whether the program on the disk is another one than this."""
        return stamp(self.code) != self.stamp


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """What one image of the supervisor leaves to the next. Numbers are file descriptors."""

    format: int
    version: str
    lock: int
    control: int
    admin: int
    admin_bind: str
    listeners: list[HandedListener]
    workers: list[HandedChild]
    follower: HandedChild | None
    departed: Snapshot
    limited: list[tuple[int, float, str, str]]
    overlay: Changed | None
    status: FollowerStatus
    generation: int
    unsent: list[Message] = []
    """what a follower has yet to be told; empty from an image that did not know of this"""

    @property
    def descriptors(self) -> list[int]:
        """All that is inherited."""
        children = [*self.workers, *([] if self.follower is None else [self.follower])]
        return [
            self.lock,
            self.control,
            self.admin,
            *(number for each in self.listeners for number in each.descriptors),
            *(number for child in children for number in (child.control, child.descriptors)),
        ]


def stamp(code: Path) -> str:
    """A digest of names, sizes and times of the program's files."""
    digest = hashlib.sha256()
    for path in sorted(code.rglob("*.py")):
        state = path.stat()
        digest.update(f"{path.relative_to(code)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


async def preflight(program: Program, data_dir: Path) -> None:
    """Let the program on the disk say whether it could take over. Raises ConfigurationError with its reason."""
    process = await asyncio.create_subprocess_exec(
        *program.check,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, FORMAT_VARIABLE: str(FORMAT)},
    )
    try:
        async with asyncio.timeout(_PREFLIGHT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise ConfigurationError(
            f"the new program did not say within {_PREFLIGHT_S:g} s that it can run"
        ) from None
    if process.returncode != 0:
        lines = errors.decode("utf-8", "replace").strip().splitlines() or [f"status {process.returncode}"]
        raise ConfigurationError(f"the new program refuses: {lines[-1].removeprefix('error: ')}")
    found = Path(json.loads(output)["node"]["data_dir"])
    if found != data_dir:
        raise ConfigurationError(
            f"node.data_dir: a running gateway cannot move from {data_dir} to {found}: restart it"
        )


def become(program: Program, handover: Handover) -> NoReturn:
    """Replace this image. Raises OSError when that cannot be done; nothing has changed then."""
    state = os.memfd_create("handover", 0)  # without CLOEXEC
    descriptors = [*handover.descriptors, state]
    try:
        os.write(state, msgspec.msgpack.encode(handover))
        os.lseek(state, 0, os.SEEK_SET)
        _set_inheritable(descriptors, inheritable=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(program.run[0], program.run, {**os.environ, _VARIABLE: str(state)})  # noqa: S606 - our own program
    except OSError:
        unblock_signals()
        _set_inheritable(descriptors, inheritable=False)
        os.close(state)
        raise


def receive(environ: "os._Environ[str]" = os.environ) -> Handover | None:
    """What an image before this one has left, if there was one. Its descriptors are ours alone from now on."""
    number = environ.pop(_VARIABLE, None)
    if number is None:
        return None
    with os.fdopen(int(number), "rb") as state:
        handover = msgspec.msgpack.decode(state.read(), type=Handover)
    _set_inheritable(handover.descriptors, inheritable=False)
    return handover


def unblock_signals() -> None:
    """The handlers are in place."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def check_format(environ: Mapping[str, str] = os.environ) -> None:
    """See that this program knows what a running one would hand over. Raises ConfigurationError."""
    found = environ.get(FORMAT_VARIABLE, str(FORMAT))
    if found != str(FORMAT):
        raise ConfigurationError(
            f"the running gateway hands over format {found}, this program knows {FORMAT}: restart it instead"
        )


def _set_inheritable(descriptors: Iterable[int], *, inheritable: bool) -> None:
    for number in descriptors:
        os.set_inheritable(number, inheritable)
