"""A stream route: the device's bytes to a TCP service and back, full duplex, with half-close and back-pressure.

Each direction ends on its own. When the device ends its side, the service sees the end of its input; when the service
ends its side, the device gets close_notify; the session is over when both have ended, or when either is gone.
Memory is bounded: while one side's buffer is above its high-water mark, the other side is not read.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, cast

from gateway.errors import BackendUnavailable, ControlError
from gateway.forward.session import DeviceEnd
from gateway.net.poller import Poller

__all__ = ["Relay", "StreamBackend"]

_BUFFER_BYTES = 64 * 1024
"""What may wait for the service before the device is not read any more; the transport adds one read at the most."""

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Runs a coroutine as a task that the worker owns."""


class Cancellable(Protocol):
    """An attempt to connect."""

    def cancel(self) -> object: ...


class StreamBackend(Protocol):
    """A backend that a stream can be connected to."""

    def begin(
        self, poller: Poller, protocol: asyncio.Protocol, done: Callable[[OSError | None], None]
    ) -> Cancellable | None:
        """Connect `protocol` without a task, and call `done`; None where that cannot be, and `connect` has to."""

    async def connect(self, poller: Poller, protocol: asyncio.Protocol) -> None:
        """Connect `protocol`, or raise BackendUnavailable."""


class RelayLog(Protocol):
    """What becomes of a relay's connection to its service, for log and metrics."""

    def backend_connected(self, duration_s: float) -> None:
        """The service took the connection."""

    def backend_failed(self, duration_s: float, error: BackendUnavailable) -> None:
        """It did not."""


class Relay(asyncio.Protocol):
    """One session: a `RouteSession` towards the device, a protocol towards the service.

    `begin` is called once; until it is connected the device is not read.
    """

    __slots__ = (
        "_device",
        "_device_finished",
        "_device_gone",
        "_log",
        "_service",
        "_service_finished",
        "_waiting",
        "connecting",
    )
    messages: Final = None  # bytes only

    def __init__(self, device: DeviceEnd, log: RelayLog) -> None:
        self._device = device
        self._log = log
        self.connecting: Cancellable | None = None
        self._service: asyncio.Transport | None = None
        self._waiting: list[bytes] = []
        self._device_finished = False
        self._device_gone = False
        self._service_finished = False
        device.pause_receiving()

    def begin(self, backend: StreamBackend, poller: Poller, spawn: Spawn) -> None:
        """Connect to the service: at once, or by a task that tries again and again."""
        started = poller.loop.time()

        def done(error: OSError | None) -> None:
            if error is None:
                self._log.backend_connected(poller.loop.time() - started)
            else:
                self.connecting = spawn(self.connect(backend, poller))

        self.connecting = backend.begin(poller, self, done) or spawn(self.connect(backend, poller))

    async def connect(self, backend: StreamBackend, poller: Poller) -> None:
        """Connect to the service, or close the session in an orderly way."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await backend.connect(poller, self)
        except BackendUnavailable as exc:
            self._log.backend_failed(loop.time() - started, exc)
            self._device.close()
        else:
            self._log.backend_connected(loop.time() - started)

    # From the device

    def device_sent(self, data: bytes) -> None:
        """Pass bytes on to the service."""
        if self._service is None:
            self._waiting.append(data)  # at most what one read of the device brought: it is paused
        elif not self._service.is_closing():  # over TLS what is written then would be an error in the log
            self._service.write(data)

    def device_finished(self, *, orderly: bool) -> None:  # noqa: ARG002 - a stream ends either way
        """Pass the end on to the service."""
        self._device_finished = True
        if self._service is not None:
            self._end_service_input(self._service)

    def device_lost(self) -> None:
        """Let the service have what was received, then end."""
        self._device_gone = True
        self._end_service()

    def pause_sending(self) -> None:
        """The device reads slowly: do not read the service."""
        if self._service is not None and not self._service_finished and not self._service.is_closing():
            self._service.pause_reading()

    def resume_sending(self) -> None:
        """The device reads again."""
        if self._service is not None and not self._service_finished and not self._service.is_closing():
            self._service.resume_reading()

    def send_command(self, command_id: str, payload: bytes) -> None:  # noqa: ARG002 - there is no place for one
        """Bytes of a stream belong to the service."""
        raise ControlError(
            "it is connected on a route that carries bytes: commands need lines, length16 or length32"
        )

    def stop(self) -> None:
        """End both sides; the service still gets what was received."""
        self._end_service()
        self._device.close()

    def _end_service(self) -> None:
        if self._service is not None:
            self._service.close()
        elif self.connecting is not None:
            self.connecting.cancel()

    # From the service

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The service took the connection."""
        transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        if self._device_gone:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        self._service = transport
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            transport.write(data)
        if self._device_finished:
            self._end_service_input(transport)
        self._device.resume_receiving()

    def data_received(self, data: bytes) -> None:
        """Pass bytes on to the device."""
        self._device.send(data)

    def eof_received(self) -> bool:
        """The service ended its side; the device's direction goes on until it ends, too."""
        self._service_finished = True
        self._device.finish()
        return not self._device_finished

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - any end is an end
        """The service is gone: nothing more can go either way."""
        self._service = None
        if not self._device_gone:
            self._device.close()

    def pause_writing(self) -> None:
        """The service reads slowly: do not read the device."""
        self._device.pause_receiving()

    def resume_writing(self) -> None:
        """The service reads again."""
        self._device.resume_receiving()

    @staticmethod
    def _end_service_input(service: asyncio.Transport) -> None:
        if service.can_write_eof() and not service.is_closing():
            service.write_eof()
