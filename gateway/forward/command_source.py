"""Commands that come from a broker: one subscription per node and backend, to `devices/{realm}/{device}/down`.

What arrives while the device is connected to this node is framed to it; what arrives otherwise is for another node, or
for nobody: nothing is kept here. Realm and device stand percent-encoded in the topic, so that a name with a separator
in it can be reached, and none reaches another device.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

__all__ = ["ArrivedCommand", "Listen", "parse_levels"]

_PREFIX = "devices"
_SUFFIX = "down"
_LEVELS = 4


class ArrivedCommand(NamedTuple):
    """A command from a broker. `id` is what the sender calls it, None when it has given none."""

    realm: str
    device: str
    payload: bytes
    id: str | None


class Listen(Protocol):
    """Arguments: the backend's name, its settings, what takes each command, what is called once subscribed.

    Listens until the connection is lost, then raises BackendUnavailable; it does not connect again by itself.
    """

    async def __call__(
        self,
        name: str,
        settings: Any,
        deliver: Callable[[ArrivedCommand], None],
        subscribed: Callable[[], None],
        /,
    ) -> None: ...


def parse_levels(levels: Sequence[str]) -> tuple[str, str] | None:
    """Realm and device of the levels of a topic or subject; None for what is no address of a device."""
    if len(levels) != _LEVELS or levels[0] != _PREFIX or levels[3] != _SUFFIX:
        return None
    try:
        realm, device = unquote(levels[1], errors="strict"), unquote(levels[2], errors="strict")
    except UnicodeDecodeError:
        return None
    return (realm, device) if realm and device else None
