"""What sinks that publish over one connection to a broker share: the connection, the batch, and the pace.

Theory of operation. A batch is published without waiting for each confirmation, and all are awaited together; a broker takes
what comes on one connection in order. It may refuse for the moment, though (a queue is full, a rule is missing), and take
what comes a moment later: then later messages of the batch overtake those that it refused. So after a refusal one message
goes alone, then two, then four: what is taken again is taken in order.
"""

import abc
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Generic, TypeVar

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import BrokerSettings, Link, Outcomes, plain, render_all
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from gateway.forward.template import Template
from gateway.net.address import address_text

__all__ = ["BrokerSink", "Pace"]

T = TypeVar("T")

_ALL: Final = 1024
"""More than a batch has."""


class Pace:
    """How many messages may be published before the first of them is confirmed."""

    def __init__(self) -> None:
        self._most = _ALL

    def first(self, waiting: list[int]) -> list[int]:
        """Of these, those that go now."""
        return waiting[: self._most]

    def went(self, *, well: bool) -> None:
        """They were taken, or not."""
        self._most = min(2 * self._most, _ALL) if well else 1


class BrokerSink(abc.ABC, Generic[T]):
    """The sink of one route in one process. `T` is a connection; what a kind does with it is `_connect` and `_publish`."""

    def __init__(
        self,
        name: str,
        settings: BrokerSettings,
        template: Template,
        disconnect: Callable[[T], Awaitable[None]],
        *,
        faults: Callable[[], tuple[type[BaseException], ...]],
        explain: Callable[[BaseException], str],
        secrets: Iterable[str | None] = (),
    ) -> None:
        address = settings.address
        self._name = name
        self._template = template
        self._pace = Pace()
        self._link: Link[T] = Link(
            name,
            self._connect,
            disconnect,
            faults=faults,
            connect_timeout_s=settings.connect_timeout_s,
            where=address_text(address.host, address.port),
            secrets=[plain(settings.password), address.password, *secrets],
            explain=explain,
        )

    async def open(self) -> None:
        """Connect and log in. Raises BackendUnavailable."""
        await self._link.open()

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        """Publish the batch, and await that it was confirmed."""
        outcomes = Outcomes(len(batch))
        places = render_all(self._template, batch, outcomes)
        error: BackendUnavailable | None = None
        if outcomes.open:
            async with self._link.use() as connection:
                while error is None and (some := self._pace.first(outcomes.open)):
                    error = await self._publish(connection, batch, places, outcomes, some)
                    self._pace.went(well=error is None)
        return outcomes.receipt(error)

    async def close(self) -> None:
        """Close the connection. Closing twice is allowed."""
        await self._link.close()

    @abc.abstractmethod
    async def _connect(self) -> T:
        """A new connection, logged in."""

    @abc.abstractmethod
    async def _publish(
        self,
        connection: T,
        batch: Sequence[Message],
        places: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> BackendUnavailable | None:
        """Publish some of the batch, each to its place, and note what became of each; the error of those that stay open."""
