"""What `doctor` looks at: each check gives findings, and every finding that is not well comes with a fix.

Nothing here changes anything: no file is made, no message sent, no schema touched.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.cli.checks.finding import Finding
from gateway.errors import ConfigurationError

if TYPE_CHECKING:
    from gateway.registry.feed import Head

__all__ = ["Finding", "examine"]


def examine(path: Path) -> Iterator[Finding]:
    """All checks on the configuration at `path`; a configuration that is wrong is the only finding then."""
    from gateway.config import load

    try:
        settings = load(path)
    except ConfigurationError as exc:
        yield Finding("configuration", "error", str(exc), f"correct {path}, then run doctor again")
        return
    yield Finding("configuration", "ok", f"{path} is valid")

    from gateway.cli.checks.backends import check_backends
    from gateway.cli.checks.files import check_disk, check_modes
    from gateway.cli.checks.ports import check_admin, check_ports
    from gateway.cli.checks.process import check_open_files, running_pid
    from gateway.cli.checks.registry import check_clock, check_registry, check_replica
    from gateway.cli.checks.tls import check_tls

    pid = running_pid(settings.node.data_dir)
    yield from check_modes(path, settings)
    yield from check_disk(settings)
    yield from check_open_files(settings, pid)
    head: list[Head] = []
    yield from check_registry(settings, head)
    yield from check_replica(settings, head[0] if head else None, is_running=pid is not None)
    yield from check_ports(settings, is_running=pid is not None)
    yield from check_admin(settings)
    yield from check_clock(settings)
    yield from check_tls(settings)
    yield from check_backends(settings)
