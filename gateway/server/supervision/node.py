"""What the supervisor needs of the configuration, and what another configuration means for a node that runs."""

import dataclasses
import os
from pathlib import Path

from gateway.errors import ConfigurationError
from gateway.server.processes.follower_settings import FollowerSettings
from gateway.server.processes.worker_settings import WorkerSettings
from gateway.server.supervision.admin_settings import AdminSettings

__all__ = ["Change", "SupervisorSettings", "compare"]


@dataclasses.dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """What the supervisor needs, and what it hands to its children."""

    name: str
    workers: int
    data_dir: Path
    drain_s: float
    admin: AdminSettings
    worker: WorkerSettings
    follower: FollowerSettings

    @property
    def worker_count(self) -> int:
        """How many workers there are to be: as many as configured, or one for each core."""
        return self.workers or os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What has to be done besides telling the workers."""

    rolls_workers: bool
    restarts_follower: bool
    rebinds_admin: bool
    reopens_admin: bool


def compare(old: SupervisorSettings, new: SupervisorSettings) -> Change:
    """What a new configuration asks for. Raises ConfigurationError when a running gateway cannot take it."""
    if old.data_dir != new.data_dir:
        raise ConfigurationError(
            f"node.data_dir: a running gateway cannot move from {old.data_dir} to {new.data_dir}: restart it"
        )
    return Change(
        rolls_workers=_held_by_workers(old) != _held_by_workers(new),
        restarts_follower=old.follower != new.follower,
        rebinds_admin=old.admin.bind != new.admin.bind,
        reopens_admin=old.admin != new.admin,
    )


def _held_by_workers(settings: SupervisorSettings) -> tuple[object, ...]:
    """What a worker keeps for its life."""
    worker = settings.worker
    return settings.worker_count, settings.drain_s, worker.master_keys, worker.max_staleness_s
