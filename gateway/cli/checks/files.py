"""Who can read and write what the configuration names, and is there room for it?"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.cli.checks.finding import Finding, Status

if TYPE_CHECKING:
    from gateway.config import GatewaySettings

__all__ = ["check_disk", "check_modes", "open_to_others"]

ROOM_BYTES_MIN: Final = 512 * 1024 * 1024
"""For the replica, which is copied anew beside the old one (96 MB for a million credentials), and some of a spool."""


def check_modes(path: Path, settings: "GatewaySettings") -> Iterator[Finding]:
    """Whether what holds secrets is open to others, and `data_dir` is ours."""
    findings = [*open_to_others(path, settings), *_data_dir_not_ours(settings.node.data_dir)]
    yield from findings or [Finding("files", "ok", "the modes of configuration, keys and data are right")]


def open_to_others(path: Path, settings: "GatewaySettings") -> Iterator[Finding]:
    """What other users may read or write, and should not."""
    private = [(path, "it may hold passwords"), *_key_files(settings)]
    database = settings.registry.url.removeprefix("sqlite:///")
    if database != settings.registry.url:
        private.append((Path(database), "it holds the devices"))
    for file, why in private:
        mode = _mode_for_others(file)
        if mode:
            yield Finding(
                "files",
                "warning",
                f"{file} is open to others (mode {mode:04o}), and {why}",
                f"chmod 600 {file}",
            )
    data_dir = settings.node.data_dir
    if data_dir.is_dir() and (mode := _mode_for_others(data_dir)):
        status: Status = "error" if mode & 0o022 else "warning"
        what = "written" if mode & 0o022 else "read"
        yield Finding(
            "files", status, f"node.data_dir {data_dir} can be {what} by others", f"chmod 700 {data_dir}"
        )


def _mode_for_others(file: Path) -> int:
    """The mode when it lets others in; 0 when it does not, or the file is missing: who needs it says that."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError:
        return 0
    return mode if mode & 0o077 else 0


def _data_dir_not_ours(data_dir: Path) -> Iterator[Finding]:
    place = next(each for each in (data_dir, *data_dir.parents) if each.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            "files",
            "error",
            f"node.data_dir {data_dir} cannot be written by this user",
            f"chown it: chown -R $USER {place}",
        )


def _key_files(settings: "GatewaySettings") -> list[tuple[Path, str]]:
    files = []
    if settings.admin.tls is not None:
        files.append((settings.admin.tls.key_file, "it is the private key of the admin endpoint"))
    for name, backend in settings.backends.items():
        if key := getattr(backend, "key_file", None):
            files.append((Path(key), f"it is the private key of backend {name}"))
    return files


def check_disk(settings: "GatewaySettings") -> Iterator[Finding]:
    """Room in `node.data_dir` for the replica, and for what the spools may still grow by."""
    data_dir = settings.node.data_dir
    place = next(each for each in (data_dir, *data_dir.parents) if each.exists())
    state = os.statvfs(place)
    free = state.f_bavail * state.f_frsize
    spooled = [route for route in settings.routes if route.delivery == "spooled"]
    wanted = sum(route.spool.bytes_max for route in spooled if route.spool is not None)
    used = sum(file.stat().st_size for file in (data_dir / "spool").rglob("*") if file.is_file())
    if free < ROOM_BYTES_MIN:
        yield Finding(
            "disk",
            "error" if not free else "warning",
            f"{_mib(free)} are free for node.data_dir {data_dir}",
            "make room there, or move node.data_dir to a larger disk",
        )
    elif wanted - used > free:
        yield Finding(
            "disk",
            "warning",
            f"spools may grow to {_mib(wanted)}, hold {_mib(used)} and have {_mib(free)} left in {data_dir}",
            "make room there, or lower spool.bytes_max: a full disk refuses messages sooner than the bound would",
        )
    else:
        yield Finding("disk", "ok", f"{_mib(free)} are free for {data_dir}")


def _mib(size: int) -> str:
    return f"{size >> 20:,} MiB"
