"""A fleet under load, and what must have become of its messages.

Each device keeps a window of messages unanswered, on connections that it opens again as often as they break. A payload
says which message it is: DEVICE/CONNECTION/NUMBER, with the number that the gateway gives the frame. So what was answered
`ok` and what came to the backend can be compared exactly.
"""

import asyncio
import collections
import contextlib
import dataclasses
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

from gateway.device.client import DeviceClient
from gateway.errors import DeviceError
from gateway.registry.sealing import Key
from tests.support.gateway import Device, wait_for

__all__ = ["Fleet", "Verdict", "judge"]


class Fleet:
    """Devices that send as long as the block runs.

    `port` is asked before each connection: a gateway that was started again has another. `rate` is messages per second
    of each device, 0 for as fast as the answers come.
    """

    def __init__(
        self,
        port: Callable[[], int | None],
        devices: Sequence[Device],
        *,
        window: int = 50,
        size: int = 40,
        rate: float = 0,
    ) -> None:
        self._port = port
        self._devices = devices
        self._window = window
        self._size = size
        self._rate = rate
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._failure: BaseException | None = None
        self.sent = 0
        self.acknowledged: set[str] = set()
        self.errors: collections.Counter[str] = collections.Counter()
        self.connections = 0
        self.orderly_ends: collections.Counter[str] = collections.Counter()
        """by device: sessions that the gateway ended with close_notify"""
        self.failures: list[str] = []
        """handshakes that failed, and sessions that broke"""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def wait_for_acknowledged(self, more: int, timeout_s: float = 30) -> None:
        """Wait until so many more are acknowledged."""
        goal = len(self.acknowledged) + more
        wait_for(
            lambda: len(self.acknowledged) >= goal or self._failure, timeout_s, f"{more} acknowledgements"
        )

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for device in self._devices:
                    tasks.create_task(self._live(device))
        except BaseException as exc:  # noqa: BLE001 - raised in the test by __exit__
            self._failure = exc

    async def _live(self, device: Device) -> None:
        connection = 0
        while not self._stopping:
            port = self._port()
            if port is not None:
                connection += 1
                try:
                    await self._connection(device, port, connection)
                except (DeviceError, OSError) as exc:
                    self.failures.append(f"{device.identity}/{connection}: no session: {exc!r}")
            await asyncio.sleep(random.uniform(0.02, 0.1))

    async def _connection(self, device: Device, port: int, connection: int) -> None:
        client = await DeviceClient.connect(
            "127.0.0.1", port, device.identity, Key(bytes.fromhex(device.key)), timeout_s=5
        )
        self.connections += 1
        name = f"{device.identity}/{connection}"
        state = _Connection(client)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(state, name))
                tasks.create_task(self._send(state, name))
        except* EOFError:
            self.orderly_ends[device.identity] += 1
        except* (DeviceError, OSError) as group:
            if not self._stopping:
                self.failures.append(f"{name}: {group.exceptions[0]!r}")
        finally:
            await client.close()

    async def _send(self, state: "_Connection", name: str) -> None:
        while not self._stopping:
            while state.sent - state.answered >= self._window and not self._stopping:
                await state.wait_for_answer()
            count = max(1, self._window - (state.sent - state.answered))
            if self._rate:
                await asyncio.sleep(1 / self._rate)
                count = 1
            lines = [
                f"{name}/{number}/".ljust(self._size, "x").encode() + b"\n"
                for number in range(state.sent + 1, state.sent + count + 1)
            ]
            state.sent += count
            self.sent += count
            await state.client.send(b"".join(lines))
        await state.client.finish()

    async def _receive(self, state: "_Connection", name: str) -> None:
        rest = b""
        while data := await state.client.receive():
            *answers, rest = (rest + data).split(b"\n")
            for answer in answers:
                word, number, *reason = answer.decode().split(" ")
                state.answered += 1
                assert int(number) == state.answered, "answers come in order"
                if word == "ok":
                    self.acknowledged.add(f"{name}/{number}")
                else:
                    assert word == "error"
                    self.errors[reason[0]] += 1
            state.progress.set()
        if not self._stopping:
            raise EOFError


class _Connection:
    def __init__(self, client: DeviceClient) -> None:
        self.client = client
        self.sent = self.answered = 0
        self.progress = asyncio.Event()

    async def wait_for_answer(self) -> None:
        self.progress.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.progress.wait(), 0.2)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of the acknowledged messages."""

    acknowledged: int
    delivered: int
    missing: list[str]
    duplicates: int
    disordered: list[str]

    def check(self) -> "Verdict":
        """Nothing is missing, nothing is out of order."""
        assert not self.missing, (
            f"{len(self.missing)} of {self.acknowledged} are missing, such as {self.missing[:5]}"
        )
        assert not self.disordered, f"out of order: {self.disordered[:5]}"
        return self


def judge(acknowledged: Iterable[str], events: Iterable[dict[str, Any]]) -> Verdict:
    """Compare what was acknowledged with the CloudEvents of the backend, in the order in which they came."""
    acknowledged = set(acknowledged)
    seen: set[str] = set()
    duplicates = 0
    disordered = []
    last: dict[str, int] = {}
    for name, session, number in _names(events):
        if name in seen:
            duplicates += 1
            continue
        seen.add(name)
        if number < last.get(session, 0):
            disordered.append(name)
        last[session] = number
    return Verdict(len(acknowledged), len(seen), sorted(acknowledged - seen), duplicates, disordered)


def _names(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    for event in events:
        device, connection, number, _ = event["data"].split("/")
        assert event["device"] == device
        assert int(event["sequence"]) == int(number)
        yield (
            f"{device}/{connection}/{number}",
            f"{device}/{connection}",
            int(number),
        )
