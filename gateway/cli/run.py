"""run: the gateway in the foreground."""

from typing import TYPE_CHECKING

import typer

from gateway.cli.options import ConfigOption, load_settings
from gateway.errors import RegistryUnavailable

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.server.supervisor import SupervisorSettings

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel="Run")
def run(config: ConfigOption = None) -> None:
    """Run the gateway in the foreground until SIGTERM or Ctrl-C."""
    settings = load_settings(config)

    import structlog

    from gateway.registry.ledger import Author
    from gateway.registry.store import Registry
    from gateway.server import loop
    from gateway.server.supervisor import Supervisor
    from gateway.telemetry.logs import setup

    setup(settings.log)
    try:
        with Registry(settings.registry, Author.of_process()):
            pass  # schema and master key fit, else this says why
    except RegistryUnavailable as exc:
        structlog.get_logger().warning("registry_away", reason=str(exc), note="waiting for it")

    async def supervise() -> None:
        await Supervisor(_supervisor_settings(settings)).run()

    loop.run(supervise())


def _supervisor_settings(settings: "GatewaySettings") -> "SupervisorSettings":
    """Each process gets its part of the configuration, and no more."""
    from gateway.server.follower import FollowerSettings
    from gateway.server.supervisor import SupervisorSettings
    from gateway.server.worker import WorkerSettings

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
