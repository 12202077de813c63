"""Commands from an MQTT broker: `devices/+/+/down`, with QoS 1.

The session is clean: what is published while the gateway is not connected is not kept for it. A retained message is
passed over, since every new subscription would bring it again. With MQTT 5 a user property `id` names the command.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.errors import BackendUnavailable
from gateway.forward.backends.mqtt import FAILURE, MqttSettings, new_mqtt_client
from gateway.forward.command_source import ArrivedCommand, parse_levels

if TYPE_CHECKING:
    import aiomqtt

__all__ = ["listen_mqtt"]

FILTER = "devices/+/+/down"


async def listen_mqtt(
    name: str,
    settings: MqttSettings,
    deliver: Callable[[ArrivedCommand], None],
    subscribed: Callable[[], None],
    /,
) -> None:
    """A `command_source.Listen`."""
    import aiomqtt

    try:
        async with new_mqtt_client(name, settings) as client:
            granted = await client.subscribe(FILTER, qos=1)
            if any(getattr(code, "value", code) >= FAILURE for code in granted):
                raise BackendUnavailable(
                    f"backend {name}: the broker does not let it subscribe to {FILTER}: look at its access rules"
                )
            subscribed()
            async for message in client.messages:
                if (command := _command(message)) is not None:
                    deliver(command)
    except (aiomqtt.MqttError, OSError, ValueError) as exc:
        raise BackendUnavailable(f"backend {name}: no commands from the broker: {exc}") from exc
    raise BackendUnavailable(f"backend {name}: the broker has closed the connection")


def _command(message: "aiomqtt.Message") -> ArrivedCommand | None:
    address = parse_levels(str(message.topic).split("/"))
    if address is None or message.retain or not isinstance(message.payload, bytes | bytearray):
        return None
    named = dict(getattr(message.properties, "UserProperty", None) or ())
    return ArrivedCommand(*address, bytes(message.payload), named.get("id"))
