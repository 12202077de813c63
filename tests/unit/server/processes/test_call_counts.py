"""How many calls a handshake, a message and a relayed record take: a guard against slow growth, on any machine.

The numbers are those of Python 3.11 and may grow by 5 %. A change that needs more says why, and writes the new number here
and in docs/performance.md; one that needs less does so too, so that the gain stays.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest

from gateway.tls.openssl import TlsVersion
from tests.support.call_counts import Calls, CountedDevice, client_context, counted_worker

TOLERANCE: Final = 1.05
WARM_UP: Final = 3
TIMES: Final = 20
LINES = {"framing": "lines", "content_type": "text/plain"}
Report = Callable[[str], None]


async def per_unit(calls: Calls, work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Calls of Python and of C for each time that `work` is done, once everything was done before."""
    for _ in range(WARM_UP):
        await work()
    calls.python = calls.c = 0
    calls.names.clear()
    for _ in range(TIMES):
        await work()
    return calls.python / TIMES, calls.c / TIMES


def check(
    what: str, counted: tuple[float, float], expected: tuple[int, int], calls: Calls, report: Report
) -> None:
    python, c = counted
    report(f"{what}: {python:.1f} calls of Python functions, {c:.1f} of C functions")
    most = "\n".join(f"{count / TIMES:6.2f}  {name}" for name, count in calls.names.most_common(60))
    assert python <= expected[0] * TOLERANCE, (
        f"{python} calls of Python functions, {expected[0]} expected:\n{most}"
    )
    assert c <= expected[1] * TOLERANCE, f"{c} calls of C functions, {expected[1]} expected:\n{most}"
    assert python >= expected[0] * 0.8, f"{python}: fewer than expected, write the new number down"


@pytest.mark.parametrize(
    ("version", "expected"),
    [(TlsVersion.TLS1_2, (132, 115)), (TlsVersion.TLS1_3, (127, 120))],
    ids=["1.2", "1.3"],
)
def test_a_connection(
    tmp_path: Path, measured: Report, version: TlsVersion, expected: tuple[int, int]
) -> None:
    """Accept, handshake, close_notify, close; its session on a framed route."""

    async def body() -> None:
        calls, context = Calls(), client_context(version)
        async with counted_worker(tmp_path, LINES, {"kind": "file", "path": str(tmp_path / "out")}) as port:

            async def connect() -> None:
                device = CountedDevice(port, context, calls)
                await device.establish()
                await device.close()

            check(f"{version.label} connection", await per_unit(calls, connect), expected, calls, measured)

    asyncio.run(body())


def test_a_message(tmp_path: Path, measured: Report) -> None:
    """One line of fifty in a record, acknowledged when the file has it."""

    async def body() -> None:
        calls, lines = Calls(), 50
        async with counted_worker(tmp_path, LINES, {"kind": "file", "path": str(tmp_path / "out")}) as port:
            device = CountedDevice(port, client_context(TlsVersion.TLS1_2), calls)
            await device.establish()

            async def send() -> None:
                await device.exchange(
                    (b"x" * 99 + b"\n") * lines, lambda answer: answer.count(b"\n") == lines
                )

            python, c = await per_unit(calls, send)
            check("a message", (python / lines, c / lines), (17, 23), calls, measured)
            await device.close()

    asyncio.run(body())


class Echo(asyncio.Protocol):
    """The service behind the stream route."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def test_a_relayed_record(tmp_path: Path, measured: Report) -> None:
    """One record from a device to its service, and as much back."""

    async def body() -> None:
        calls, data = Calls(), bytes(100)
        service = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
        backend = {"kind": "tcp", "url": f"tcp://127.0.0.1:{service.sockets[0].getsockname()[1]}"}
        async with counted_worker(tmp_path, {"framing": "stream"}, backend) as port:
            device = CountedDevice(port, client_context(TlsVersion.TLS1_2), calls)
            await device.establish()

            async def send() -> None:
                await device.exchange(data, lambda answer: len(answer) == len(data))

            check("a record relayed and echoed", await per_unit(calls, send), (28, 27), calls, measured)
            await device.close()
        service.close()

    asyncio.run(body())
