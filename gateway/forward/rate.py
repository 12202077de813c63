"""How much one device may send on a route."""

import asyncio
import weakref
from collections.abc import Callable
from typing import Final

from gateway.forward.framed import Answer, Delivery
from gateway.forward.message import Message
from gateway.forward.session import DeviceInfo
from gateway.forward.window import Sender
from gateway.token_bucket import TokenBucket
from gateway.wire.framing import Reason

__all__ = ["BURST_S", "DeviceRates"]

BURST_S: Final = 10.0
"""What may come at once, in seconds of the rate: devices send in bursts, above all after they were offline."""


class _DeviceRate:
    """The buckets of one device, shared by its sessions."""

    __slots__ = ("__weakref__", "_bytes", "_messages")

    def __init__(self, messages: TokenBucket | None, bytes_: TokenBucket | None) -> None:
        self._messages = messages
        self._bytes = bytes_

    def admit(self, size: int, now: float) -> bool:
        """Count a message, unless it is one too many."""
        messages, bytes_ = self._messages, self._bytes
        if (messages is not None and not messages.has(1, now)) or (
            bytes_ is not None and not bytes_.has(size, now)
        ):
            return False
        if messages is not None:
            messages.take(1)
        if bytes_ is not None:
            bytes_.take(size)
        return True


class DeviceRates:
    """The rates of a route in one worker. A device is remembered as long as it has a session.

    `messages_per_s` and `bytes_per_s`: 0 for no limit. One message of `message_bytes_max` always fits a full bucket.
    """

    def __init__(
        self, messages_per_s: float, bytes_per_s: float, message_bytes_max: int, now: Callable[[], float]
    ) -> None:
        self._messages_per_s = messages_per_s
        self._bytes_per_s = bytes_per_s
        self._message_bytes_max = message_bytes_max
        self._now = now
        self._devices: weakref.WeakValueDictionary[tuple[str, str], _DeviceRate] = (
            weakref.WeakValueDictionary()
        )

    def limit(self, delivery: Delivery, info: DeviceInfo) -> Delivery:
        """The delivery for a session of this device."""
        if not self._messages_per_s and not self._bytes_per_s:
            return delivery
        key = (info.realm, info.device)
        rate = self._devices.get(key)
        if rate is None:
            rate = self._devices[key] = self._new()
        return _LimitedDelivery(delivery, rate, self._now)

    def _new(self) -> _DeviceRate:
        now = self._now()
        per_s, bytes_per_s = self._messages_per_s, self._bytes_per_s
        return _DeviceRate(
            TokenBucket(per_s, max(1.0, per_s * BURST_S), now) if per_s else None,
            TokenBucket(bytes_per_s, max(self._message_bytes_max, bytes_per_s * BURST_S), now)
            if bytes_per_s
            else None,
        )


class _LimitedDelivery:
    """A delivery that refuses what comes too fast."""

    __slots__ = ("_delivery", "_now", "_rate")

    def __init__(self, delivery: Delivery, rate: _DeviceRate, now: Callable[[], float]) -> None:
        self._delivery = delivery
        self._rate = rate
        self._now = now

    @property
    def is_full(self) -> bool:
        return self._delivery.is_full

    def when_free(self, sender: Sender) -> None:
        self._delivery.when_free(sender)

    def submit(self, message: Message, done: Answer) -> None:
        if self._rate.admit(len(message.payload), self._now()):
            self._delivery.submit(message, done)
        else:
            asyncio.get_running_loop().call_soon(done, message, Reason.RATE_LIMITED)
