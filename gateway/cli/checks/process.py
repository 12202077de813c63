"""The running gateway, if there is one, and what its processes may open."""

import asyncio
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.cli.checks.finding import Finding

if TYPE_CHECKING:
    from gateway.config import GatewaySettings

__all__ = ["check_open_files", "running_pid"]

CONTROL_S: Final = 3.0


def running_pid(data_dir: Path) -> int | None:
    """The process that answers on the control socket of this folder, None when none does."""
    from gateway.errors import ControlError
    from gateway.server.control.channel import CONTROL_SOCKET, connect_unix

    async def connect() -> int | None:
        try:
            async with asyncio.timeout(CONTROL_S), connect_unix(data_dir / CONTROL_SOCKET) as channel:
                return channel.peer_pid
        except (ControlError, TimeoutError):
            return None

    return asyncio.run(connect())


def check_open_files(settings: "GatewaySettings", pid: int | None) -> Iterator[Finding]:
    """Whether a worker may open what its share of `limits.connections` takes."""
    from gateway.server.processes.open_files import open_files_needed

    workers = settings.node.workers or os.cpu_count() or 1
    needed = open_files_needed(settings.limits.connections, workers)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if pid is None else _allowed(pid)
    whose = "a gateway started from here" if pid is None else "the running gateway"
    if allowed is None:
        yield Finding("open files", "ok", f"those of {whose} cannot be seen by this user")
    elif allowed != resource.RLIM_INFINITY and allowed < needed:
        yield Finding(
            "open files",
            "warning",
            f"each worker of {whose} may open {allowed:,} files, and limits.connections = {settings.limits.connections} takes {needed:,}",
            f"LimitNOFILE={needed} in its unit (`ulimit -n {needed}` in a shell), or lower limits.connections",
        )
    else:
        few = "any number of" if allowed == resource.RLIM_INFINITY else f"{allowed:,}"
        yield Finding("open files", "ok", f"each worker of {whose} may open {few} files and needs {needed:,}")


def _allowed(pid: int) -> int | None:
    """The hard limit of open files of a process; None when it is another user's, -1 for none."""
    try:
        found = re.search(
            r"^Max open files +\S+ +(\S+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    return None if found is None else -1 if found[1] == "unlimited" else int(found[1])
