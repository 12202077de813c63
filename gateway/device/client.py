"""A device's client on a framed route: every message is sent until the gateway says that it is safe.

Theory of operation
-------------------
A message is first put into the store, then waits in `_waiting`, then is in flight on the one link there is, in the order
of its numbers; the gateway answers frames in order, so the oldest in flight is the one that is answered. When the link
is lost, what was in flight goes back to the head of `_waiting`: the next link begins with it. So each message reaches the
gateway at least once, and a caller hears of it exactly once. A message whose `ok` was lost with the link is sent again;
with `message_ids` both copies carry the same id, by which the gateway's consumers can tell.

Answers that may change (`unavailable full rate_limited stopping`) put the message back the same way, and sending pauses
for a back-off; the others are final and raise. One task, `_stay_connected`, opens links and waits; all else runs in the
link's callbacks.
"""

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Final, Self

from gateway.device.backoff import BackOff
from gateway.device.incoming import Answer, Command, Receipt, Reply, decode_incoming
from gateway.device.keyring import KeyRing
from gateway.device.link import Dialer, Link
from gateway.device.store import MemoryStore, Store, Stored
from gateway.device.stream import DeviceClient
from gateway.errors import DeviceError, DeviceRefused, MessageRefused
from gateway.tls.openssl import TlsVersion
from gateway.wire.framing import FrameDecoder, Reason
from gateway.wire.framings import FRAMINGS

__all__ = ["Client", "ClientSettings", "DeviceClient"]

PASSING: Final = frozenset({Reason.UNAVAILABLE, Reason.FULL, Reason.RATE_LIMITED, Reason.STOPPING})
"""Answers that may be different the next time."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client may be told. The defaults suit a device with a few messages a second."""

    framing: str = "lines"
    """As the route has it."""
    message_ids: bool = False
    """Begin each frame with an id and a space, for a route with `message_id = "prefix"`."""
    resend: frozenset[str] = frozenset(PASSING)
    """Reasons after which a message is sent again later; any other raises MessageRefused."""
    in_flight_max: int = 256
    """Messages without an answer; the gateway takes no more of one session before it answers."""
    in_flight_bytes_max: int = 256 * 1024
    """The same in bytes. One message always fits."""
    incoming_max: int = 1024
    """Replies and commands that wait for `incoming`."""
    incoming_bytes_max: int = 1024 * 1024
    """The longest frame that the gateway may send."""
    connect_timeout_s: float = 10.0
    """For name, connection and handshake together."""
    answer_timeout_s: float = 30.0
    """Without any answer for so long while one is due, the connection is given up and made anew."""
    back_off_first_s: float = 0.5
    """The longest wait before the first new try; doubled with each failure, and jittered."""
    back_off_longest_s: float = 30.0
    """The longest wait of all."""


class Client:
    """A device on a framed route, connected as long as it is open. For one event loop.

    async with Client("gateway.example", 8883, KeyRing.of("meter-7", key)) as client:
        await client.send(b"21.5")

    Entering connects, and raises DeviceError when that fails; with `start_offline` it returns at once and goes on trying.
    Leaving waits `close_timeout_s` at most for answers still due, unless it is left by an exception.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ring: KeyRing,
        *,
        store: Store | None = None,
        settings: ClientSettings | None = None,
        server_name: str | None = None,
        highest: TlsVersion = TlsVersion.TLS1_3,
        start_offline: bool = False,
        close_timeout_s: float = 10.0,
    ) -> None:
        self._settings = settings = settings or ClientSettings()
        if settings.framing not in FRAMINGS:
            raise DeviceError(f"{settings.framing!r} is no framing of messages: {', '.join(FRAMINGS)}")
        self._framing = FRAMINGS[settings.framing]
        self._dialer = Dialer(host, port, ring, server_name, settings.connect_timeout_s, highest=highest)
        self._store: Store = store or MemoryStore()
        self._start_offline = start_offline
        self._close_timeout_s = close_timeout_s
        self._back_off = BackOff(settings.back_off_first_s, settings.back_off_longest_s)
        self._resend_back_off = BackOff(settings.back_off_first_s, settings.back_off_longest_s)
        self._task: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._decoder: FrameDecoder = self._framing.decoder(settings.incoming_bytes_max)
        self._waiting: collections.deque[Stored] = collections.deque()
        self._in_flight: collections.deque[Stored] = collections.deque()
        self._in_flight_bytes = 0
        self._put_back: list[Stored] = []
        self._awaited: dict[int, asyncio.Future[Receipt]] = {}
        self._answered = 0
        self._answered_at = 0.0
        self._incoming: collections.deque[Reply | Command] = collections.deque()
        self._is_read = False
        self._gateway_slow = False
        self._pump_due = False
        self._resume_at: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._online = asyncio.Event()
        self._offline = asyncio.Event()
        self._tried = asyncio.Event()
        self._idle = asyncio.Event()
        self._arrived = asyncio.Event()
        self._idle.set()
        self._closing = False
        self.problem: DeviceError | None = None
        """Why there is no connection, while there is none."""
        self.incoming_dropped = 0
        """Replies and commands that nobody read, the oldest first."""

    # Life

    async def open(self) -> None:
        """What entering does."""
        self._waiting.extend(await self._store.open())
        if self._waiting:
            self._idle.clear()
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())
        if self._start_offline:
            return
        try:
            await self._connected_once()
        except BaseException:
            await self._stop()
            raise

    async def _connected_once(self) -> None:
        await self._tried.wait()
        if self.problem is not None:
            raise self.problem

    async def close(self, timeout_s: float | None = None) -> None:
        """Wait for the answers still due, `timeout_s` at most, then say goodbye. Safe to repeat.

        What has no answer then stays in a FileStore; callers that wait for it get DeviceError.
        """
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._close_timeout_s if timeout_s is None else timeout_s):
                await self._idle.wait()
        await self._stop()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(None if exc is None else 0)

    # Messages

    async def send(self, payload: bytes) -> Receipt:
        """Send a message and wait until the gateway says that it is safe, over as many connections as that takes.

        Raises MessageRefused for a final refusal, StoreFull, ValueError for a payload that the framing cannot carry, and
        DeviceError when the client is closed first. Cancelling (a time-out) stops the waiting, not the message.
        """
        return await asyncio.shield(await self.post(payload))

    async def post(self, payload: bytes) -> "asyncio.Future[Receipt]":
        """Put a message into the store and return: what it gives has the receipt, or the refusal, when there is one."""
        self._check_open()
        self._framing.encode(payload)  # what cannot be sent is refused before it is kept
        message = await self._store.put(payload)
        self._check_open()
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        receipt.add_done_callback(_look_at)  # a refusal that nobody waits for is no mistake of the program
        self._awaited[message.number] = receipt
        self._waiting.append(message)
        self._idle.clear()
        self._pump_soon()
        return receipt

    async def flush(self) -> None:
        """Wait until every message has its answer."""
        await self._idle.wait()

    async def incoming(self) -> AsyncIterator[Reply | Command]:
        """Replies and commands as they come, until the client is closed. For one reader at a time.

        While it is read, a full queue makes the gateway wait; while nobody reads, the oldest are dropped and counted.
        """
        self._is_read = True
        try:
            while True:
                while self._incoming:
                    item = self._incoming.popleft()
                    if self._link is not None and len(self._incoming) <= self._settings.incoming_max // 2:
                        self._link.resume_receiving()
                    yield item
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            self._is_read = False
            if self._link is not None:
                self._link.resume_receiving()

    def message_id(self, number: int) -> str:
        """The id of a message: different for every message of every store."""
        return f"{self._store.name}-{number}"

    @property
    def link(self) -> Link | None:
        """The connection there is: its version, cipher, hint and identity."""
        return self._link

    @property
    def unanswered(self) -> int:
        """Messages that the gateway has not answered."""
        return len(self._waiting) + len(self._in_flight) + len(self._put_back)

    async def online(self) -> None:
        """Wait for a connection."""
        await self._online.wait()

    # Connections

    async def _stay_connected(self) -> None:
        """Open one link after the other."""
        loop = asyncio.get_running_loop()
        while True:
            self._offline.clear()
            try:
                await self._dialer.connect(self)
            except DeviceRefused as exc:  # an operator may put it right, but hardly within a second
                self.problem = exc
                wait_s = self._back_off.longest()
            except DeviceError as exc:
                self.problem = exc
                wait_s = self._back_off.next()
            else:
                self._tried.set()
                opened_at = loop.time()
                await self._offline.wait()
                if loop.time() - opened_at > self._settings.back_off_longest_s:
                    self._back_off.reset()
                wait_s = self._back_off.next()
            self._tried.set()
            await asyncio.sleep(wait_s)

    async def _stop(self) -> None:
        assert self._task is not None
        self._closing = True
        link = self._link
        if link is not None:
            link.finish()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._offline.wait()
            link.close()
        self._task.cancel()
        await asyncio.wait({self._task})
        self._task = None
        for timer in (self._resume_at, self._watch):
            if timer is not None:
                timer.cancel()
        for receipt in self._awaited.values():
            if not receipt.done():
                receipt.set_exception(DeviceError("the client was closed before the gateway answered"))
        self._awaited.clear()
        self._arrived.set()
        await self._store.close()

    def _check_open(self) -> None:
        if self._task is None or self._closing:
            raise DeviceError("the client is not open")

    # From the link

    def link_opened(self, link: Link) -> None:
        """Begin a session: frames are counted from 1."""
        self._link = link
        self.problem = None
        self._answered = 0
        self._gateway_slow = False
        self._decoder = self._framing.decoder(self._settings.incoming_bytes_max)
        self._online.set()
        self._pump_soon()

    def link_received(self, data: bytes) -> None:
        """Take answers, replies and commands."""
        assert self._link is not None
        try:
            for frame in self._decoder.feed(data):
                if not isinstance(frame, bytes):
                    raise ValueError(f"a frame of more than {self._settings.incoming_bytes_max} bytes")  # noqa: TRY004, TRY301 -- one of the things that no gateway sends, and answered like the others
                self._take(decode_incoming(frame))
        except ValueError as exc:
            self._give_up(f"{self._dialer.where} sent {exc}: is its route framed as {self._framing.name}?")

    def link_finished(self) -> None:
        """The gateway has answered all that it will: end our side, too."""
        if self._link is not None:
            self._link.close()

    def link_lost(self, error: DeviceError | None) -> None:
        """What had no answer is sent again on the next link."""
        self._link = None
        if self.problem is None:
            self.problem = error or DeviceError(f"{self._dialer.where} ended the session")
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._return_unanswered()
        self._online.clear()
        self._offline.set()

    def pause_sending(self) -> None:
        """The gateway reads slowly."""
        self._gateway_slow = True

    def resume_sending(self) -> None:
        """It reads again."""
        self._gateway_slow = False
        self._pump_soon()

    # Sending

    def _pump_soon(self) -> None:
        """Send what may be sent, once per turn of the event loop: messages that come together leave together."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        link = self._link
        if (
            link is None
            or not link.is_open
            or self._gateway_slow
            or self._put_back
            or self._resume_at is not None
        ):
            return
        frames: list[bytes] = []
        while self._waiting and self._has_room(len(self._waiting[0].payload)):
            message = self._waiting.popleft()
            self._in_flight.append(message)
            self._in_flight_bytes += len(message.payload)
            frames.append(self._framing.encode(self._content(message)))
        if not frames:
            return
        if self._watch is None:
            loop = asyncio.get_running_loop()
            self._answered_at = loop.time()
            self._watch = loop.call_later(self._settings.answer_timeout_s, self._check_answers)
        link.send(b"".join(frames))

    def _has_room(self, size: int) -> bool:
        if not self._in_flight:
            return True
        settings = self._settings
        return (
            len(self._in_flight) < settings.in_flight_max
            and self._in_flight_bytes + size <= settings.in_flight_bytes_max
        )

    def _content(self, message: Stored) -> bytes:
        if not self._settings.message_ids:
            return message.payload
        return self.message_id(message.number).encode("ascii") + b" " + message.payload

    def _check_answers(self) -> None:
        """Whether the gateway still answers."""
        self._watch = None
        if self._link is None or not self._in_flight:
            return
        loop = asyncio.get_running_loop()
        due_at = self._answered_at + self._settings.answer_timeout_s
        if loop.time() < due_at:
            self._watch = loop.call_at(due_at, self._check_answers)
            return
        self._give_up(
            f"{self._dialer.where} has not answered for {self._settings.answer_timeout_s:g} s: is its backend well?"
        )

    def _give_up(self, why: str) -> None:
        self.problem = DeviceError(why)
        if self._link is not None:
            self._link.abort()

    # Answers

    def _take(self, item: Answer | Command) -> None:
        if isinstance(item, Command):
            self._keep(item)
            return
        if not self._in_flight or item.number != self._answered + 1:
            raise ValueError(f"an answer to frame {item.number}, and {self._answered + 1} is the next")
        self._answered = item.number
        self._answered_at = asyncio.get_running_loop().time()
        message = self._in_flight.popleft()
        self._in_flight_bytes -= len(message.payload)
        if item.reason is not None and item.reason in self._settings.resend:
            self._put_back.append(message)
        else:
            self._back_off.reset()
            self._resend_back_off.reset()
            self._settle(message, item)
        if self._put_back:
            self._resend_later()
        else:
            self._pump_soon()

    def _settle(self, message: Stored, answer: Answer) -> None:
        """The last word about a message: the store forgets it, and who waits for it is told."""
        self._store.remove(message.number)
        name = self.message_id(message.number)
        receipt = self._awaited.pop(message.number, None)
        if answer.reply is not None:
            self._keep(Reply(name, answer.reply))
        if receipt is not None and not receipt.done():
            if answer.reason is None:
                receipt.set_result(Receipt(name, answer.reply))
            else:
                receipt.set_exception(MessageRefused(answer.reason))
        if not self.unanswered:
            self._idle.set()

    def _resend_later(self) -> None:
        """When all that is in flight has its answer, wait, then begin with the oldest again."""
        if self._in_flight or self._resume_at is not None:
            return
        self._return_unanswered()
        self._resume_at = asyncio.get_running_loop().call_later(self._resend_back_off.next(), self._resume)

    def _resume(self) -> None:
        self._resume_at = None
        self._pump_soon()

    def _return_unanswered(self) -> None:
        """In the order of their numbers, before all that was never sent."""
        again = [*self._put_back, *self._in_flight]
        self._waiting.extendleft(reversed(again))
        self._put_back.clear()
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def _keep(self, item: Reply | Command) -> None:
        self._incoming.append(item)
        if len(self._incoming) > self._settings.incoming_max:
            if self._is_read and self._link is not None:
                self._link.pause_receiving()
            elif not self._is_read:
                self._incoming.popleft()
                self.incoming_dropped += 1
        self._arrived.set()


def _look_at(receipt: "asyncio.Future[Receipt]") -> None:
    if not receipt.cancelled():
        receipt.exception()
