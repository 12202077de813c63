"""run: the gateway in the foreground."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gateway.cli.options import ConfigOption, load_settings
from gateway.errors import RegistryUnavailable

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.server.supervision.node import SupervisorSettings
    from gateway.server.supervision.upgrade import Program

__all__ = ["app", "check_registry"]

app = typer.Typer()


@app.command(rich_help_panel="Run")
def run(config: ConfigOption = None) -> None:
    """Run the gateway in the foreground until SIGTERM or Ctrl-C.

    SIGHUP reloads the configuration, SIGUSR2 goes on as the program that is installed now; see docs/reload.md.
    """
    from gateway.config import find_config
    from gateway.net import loop
    from gateway.server.supervision import upgrade
    from gateway.server.supervision.supervisor import Supervisor
    from gateway.telemetry.logs import setup

    handover = upgrade.receive()
    path = find_config(config).absolute()
    program = _program(path)
    settings = load_settings(path)
    setup(settings.log)
    check_registry(settings)
    _warn_of_exposed_files(path, settings)

    def load() -> "SupervisorSettings":
        settings = load_settings(path)
        check_registry(settings)
        return _supervisor_settings(settings)

    async def supervise() -> None:
        await Supervisor(_supervisor_settings(settings), program, load, handover).run()

    loop.run(supervise())


def _warn_of_exposed_files(path: Path, settings: "GatewaySettings") -> None:
    """Warn of files with secrets that others may read."""
    import structlog

    from gateway.cli.checks.files import open_to_others

    for finding in open_to_others(path, settings):
        structlog.get_logger().warning("files_exposed", detail=finding.detail, fix=finding.fix)


def check_registry(settings: "GatewaySettings") -> None:
    """See that schema and master key fit; a registry that is away is waited for."""
    import structlog

    from gateway.registry.ledger import Author
    from gateway.registry.store import Registry

    try:
        with Registry(settings.registry, Author.of_process()):
            pass
    except RegistryUnavailable as exc:
        structlog.get_logger().warning("registry_away", reason=str(exc), note="waiting for it")


def _program(config: Path) -> "Program":
    """How this program was started, whether by `gatewayctl` or by `python -m gateway`."""
    import gateway
    from gateway.server.supervision.upgrade import Program, stamp

    start = (sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1])
    code = Path(gateway.__file__).parent
    check = (*start, "check-config", "--for-upgrade", "--json", "--config", str(config))
    return Program((sys.executable, *sys.orig_argv[1:]), check, code, stamp(code))


def _supervisor_settings(settings: "GatewaySettings") -> "SupervisorSettings":
    """Each process gets its part of the configuration, and no more."""
    from gateway.server.processes.follower_settings import FollowerSettings
    from gateway.server.processes.worker_settings import WorkerSettings
    from gateway.server.supervision.node import SupervisorSettings

    master_keys = settings.registry.master_keys()
    return SupervisorSettings(
        name=settings.node.name,
        workers=settings.node.workers,
        data_dir=settings.node.data_dir,
        drain_s=settings.node.drain_s,
        admin=settings.admin,
        worker=WorkerSettings(
            log=settings.log,
            data_dir=settings.node.data_dir,
            drain_s=settings.node.drain_s,
            max_staleness_s=settings.registry.max_staleness_s,
            master_keys=master_keys,
            limits=settings.limits,
            listeners=settings.listeners,
            routes=settings.routes,
            backends=settings.backends,
        ),
        follower=FollowerSettings(
            log=settings.log,
            data_dir=settings.node.data_dir,
            registry=settings.registry,
            master_keys=master_keys,
        ),
    )
