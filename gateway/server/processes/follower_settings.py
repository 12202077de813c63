"""What the supervisor tells the follower of the configuration, over the control channel."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from gateway.registry.masterkeys import MasterKeySource
from gateway.registry.settings import RegistrySettings
from gateway.telemetry.logs import LogSettings

__all__ = ["FollowerSettings"]


class FollowerSettings(BaseModel):
    """What of the configuration the follower needs."""

    model_config = ConfigDict(frozen=True)

    log: LogSettings
    data_dir: Path
    registry: RegistrySettings
    master_keys: MasterKeySource

    def to_json(self) -> bytes:
        """For the control channel, with the registry's whole URL: it is masked in every other JSON."""
        return to_json(self.model_dump())
