"""What the supervisor tells a worker of the configuration, over the control channel."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gateway.forward.settings import BackendSettings, RouteSettings
from gateway.registry.masterkeys import MasterKeySource
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.settings import ListenerSettings
from gateway.telemetry.logs import LogSettings

__all__ = ["WorkerSettings"]


class WorkerSettings(BaseModel):
    """What of the configuration a worker needs."""

    model_config = ConfigDict(frozen=True)

    log: LogSettings
    data_dir: Path
    drain_s: float
    max_staleness_s: float
    master_keys: MasterKeySource
    limits: LimitsSettings
    listeners: tuple[ListenerSettings, ...]
    routes: tuple[RouteSettings, ...]
    backends: dict[str, BackendSettings]
