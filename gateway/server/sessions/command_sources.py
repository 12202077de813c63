"""The subscriptions of a node: what brokers send to devices, for the one worker that listens."""

import asyncio
import random
import secrets
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from gateway.errors import BackendUnavailable
from gateway.forward.backends.mqtt_commands import listen_mqtt
from gateway.forward.backends.nats_commands import listen_nats
from gateway.forward.command_source import ArrivedCommand, Listen
from gateway.forward.message import UUID7_RANDOM_BITS, uuid7
from gateway.forward.settings import BackendSettings
from gateway.server.control.messages import SendCommand
from gateway.wire.framing import is_message_id

__all__ = ["CommandSources"]

log = structlog.get_logger()

LISTENERS: Final[Mapping[str, Listen]] = {"mqtt": listen_mqtt, "nats": listen_nats}
"""Kinds of backends that can send commands."""
ACKNOWLEDGED_WITHIN_S: Final = 10.0
_BACK_OFF_FIRST_S: Final = 0.5
_BACK_OFF_MAX_S: Final = 30.0


class CommandSources:
    """Listens on every backend with `commands = true`."""

    def __init__(
        self,
        backends: Mapping[str, BackendSettings],
        tell: Callable[[SendCommand], None],
        *,
        payload_bytes_max: int,
        wall: Callable[[], float],
    ) -> None:
        self._backends = {
            name: settings
            for name, settings in backends.items()
            if settings.kind in LISTENERS and getattr(settings, "commands", False)
        }
        self._tell = tell
        self._payload_bytes_max = payload_bytes_max
        self._wall = wall

    async def run(self) -> None:
        """Listen until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name, settings in self._backends.items():
                tasks.create_task(self._keep_listening(name, settings))

    async def _keep_listening(self, name: str, settings: BackendSettings) -> None:
        """Connect, and connect again when the connection is lost; log it once, not per try."""
        loop = asyncio.get_running_loop()
        back_off_s = 0.0
        is_away = False
        while True:
            subscribed_at: float | None = None

            def subscribed() -> None:
                nonlocal subscribed_at, is_away
                subscribed_at, is_away = loop.time(), False
                log.info("commands_subscribed", backend=name)

            try:
                await LISTENERS[settings.kind](name, settings, self._arrived, subscribed)
            except BackendUnavailable as exc:
                if not is_away:
                    is_away = True
                    log.warning("commands_away", backend=name, reason=str(exc))
            if subscribed_at is not None and loop.time() - subscribed_at > _BACK_OFF_MAX_S:
                back_off_s = 0.0
            back_off_s = min(max(back_off_s * 2, _BACK_OFF_FIRST_S), _BACK_OFF_MAX_S)
            await asyncio.sleep(back_off_s * random.uniform(0.5, 1))  # noqa: S311 - spreads load, guards nothing

    def _arrived(self, command: ArrivedCommand) -> None:
        if len(command.payload) > self._payload_bytes_max:
            log.info(
                "command_too_long",
                device=command.device,
                realm=command.realm,
                payload_bytes=len(command.payload),
            )
            return
        command_id = command.id
        if command_id is None or not is_message_id(command_id):
            command_id = uuid7(self._wall(), secrets.randbits(UUID7_RANDOM_BITS))
        self._tell(
            SendCommand(command.realm, command.device, command_id, command.payload, ACKNOWLEDGED_WITHIN_S)
        )
