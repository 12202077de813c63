"""Master keys of a running process: looked at now and then, said when they change."""

import structlog

from gateway.errors import ConfigurationError
from gateway.registry.masterkeys import KeyRing

__all__ = ["refresh_keys"]

log = structlog.get_logger()


def refresh_keys(ring: KeyRing) -> None:
    """Take the keys that the file has now; one that holds none is logged, and the keys before stay in use."""
    try:
        if ring.refresh():
            log.info("master_keys_read", sealing_with=ring.sealer.master_key_id.hex())
    except ConfigurationError as exc:
        log.error("master_keys_unusable", reason=str(exc))
