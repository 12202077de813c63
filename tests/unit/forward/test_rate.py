import asyncio
import gc

import pytest

from gateway.forward.framed import Answer
from gateway.forward.message import Message
from gateway.forward.rate import DeviceRates
from gateway.forward.session import DeviceInfo
from gateway.forward.window import Sender
from gateway.wire.framing import Reason
from tests.support.senders import Paused


class Taken:
    """A delivery that keeps what it is given."""

    is_full = False

    def __init__(self) -> None:
        self.messages: list[int] = []
        self.paused: list[Sender] = []

    def submit(self, message: Message, done: Answer) -> None:
        self.messages.append(message.sequence)
        done(message, None)

    def when_free(self, sender: Sender) -> None:
        self.paused.append(sender)


def message(number: int, size: int = 1) -> Message:
    return Message("r", "d", "d", None, "s", number, 0.0, bytes(size))


def info(device: str = "d") -> DeviceInfo:
    return DeviceInfo("r", device, device, None, "s")


class TestDeviceRates:
    def test_no_limit_costs_nothing(self) -> None:
        delivery = Taken()
        assert DeviceRates(0, 0, 100, lambda: 0.0).limit(delivery, info()) is delivery

    @pytest.mark.parametrize(("messages_per_s", "bytes_per_s"), [(1, 0), (0, 10), (1, 10)])
    def test_refused_beyond_it(self, messages_per_s: float, bytes_per_s: float) -> None:
        now = 0.0
        answers: list[Reason | None] = []

        async def test() -> None:
            nonlocal now
            inner = Taken()
            delivery = DeviceRates(messages_per_s, bytes_per_s, 50, lambda: now).limit(inner, info())
            for number in range(1, 13):
                delivery.submit(
                    message(number, 10), lambda _message, reason, _reply=None: answers.append(reason)
                )
            assert inner.messages == list(range(1, 11))
            assert answers == [None] * 10  # refusals never from within
            await asyncio.sleep(0)
            assert answers == [None] * 10 + [Reason.RATE_LIMITED] * 2
            now = 1.0
            delivery.submit(message(13, 10), lambda _message, _reason, _reply=None: None)
            assert inner.messages[-1] == 13

        asyncio.run(test())

    def test_sessions_of_a_device_share_it_and_others_have_their_own(self) -> None:
        async def test() -> None:
            inner = Taken()
            rates = DeviceRates(0.1, 0, 100, lambda: 0.0)
            one, other, foreign = (rates.limit(inner, info(name)) for name in ("d", "d", "e"))
            one.submit(message(1), lambda _message, _reason, _reply=None: None)
            other.submit(message(2), lambda _message, _reason, _reply=None: None)
            foreign.submit(message(3), lambda _message, _reason, _reply=None: None)
            assert inner.messages == [1, 3]
            del one, other, foreign
            gc.collect()
            assert not rates._devices

        asyncio.run(test())

    def test_the_largest_message_fits_a_low_rate(self) -> None:
        inner = Taken()
        delivery = DeviceRates(0, 1, 5000, lambda: 0.0).limit(inner, info())
        delivery.submit(message(1, 5000), lambda _message, _reason, _reply=None: None)
        assert inner.messages == [1]

    def test_back_pressure_goes_through(self) -> None:
        inner = Taken()
        delivery = DeviceRates(1, 0, 100, lambda: 0.0).limit(inner, info())
        assert not delivery.is_full
        sender = Paused(lambda: None)
        delivery.when_free(sender)
        assert inner.paused == [sender]
