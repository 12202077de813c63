"""A connection from a balancer, until it has said by a PROXY header whose it is.

Then a `DeviceConnection` takes its socket over, with the device's own address, and is admitted or not as if the device had
connected by itself. Before the header only the limit on all connections counts, and a deadline of its own.
"""

import asyncio
from typing import cast

import structlog

from gateway.errors import PeerError
from gateway.net.stream import Stream
from gateway.server.admission.listener import Listener
from gateway.server.connections.connection import DeviceConnection
from gateway.server.connections.ending import GONE, HANDSHAKE, STOP_S
from gateway.server.connections.services import Services
from gateway.telemetry.metrics import Outcome
from gateway.wire.proxy_protocol import ProxyHeader, ProxyHeaderScanner

__all__ = ["ProxiedConnection"]

log = structlog.get_logger()


class ProxiedConnection(asyncio.Protocol):
    """A protocol for the event loop. Who is not in `proxy_protocol_from` is a device, and sends no header."""

    __slots__ = ("_address", "_listener", "_scanner", "_services", "_transport", "deadline", "phase", "slot")

    def __init__(self, listener: Listener, services: Services) -> None:
        self._listener = listener
        self._services = services
        self._scanner = ProxyHeaderScanner()
        self._transport: Stream | None = None
        self._address = ""
        self.phase = GONE
        self.deadline = 0.0
        self.slot = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the header, if there has to be one."""
        self._transport = transport = cast("Stream", transport)
        self._address = transport.host
        services = self._services
        if self._address not in self._listener.balancers:
            self._hand_over(None)
        elif services.limits.admit_balancer():
            self.phase = HANDSHAKE
            self._listener.connections += 1
            self.deadline = services.now() + services.settings.proxy_header_timeout_s
            services.deadlines.add(self)
        else:
            self._failed(Outcome.RATE_LIMITED, "limits.connections")
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take a piece of the header, and perhaps what comes behind it."""
        if self.phase is not HANDSHAKE:
            return
        try:
            header = self._scanner.feed(data)
        except PeerError as error:
            self._end(Outcome.PROTOCOL_ERROR, str(error))
            return
        if header is not None:
            self._leave()
            self._hand_over(header if header.source is not None else None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The balancer hung up before it said anything, as its health checks may do."""
        if self.phase is HANDSHAKE:
            self._leave()
            self._failed(Outcome.PEER_CLOSED, "the balancer closed the connection before its PROXY header")

    def deadline_passed(self) -> None:
        """No header in time, however many bytes trickled in."""
        seconds = self._services.settings.proxy_header_timeout_s
        self._end(Outcome.TIMEOUT, f"no PROXY header within {seconds:g} s")

    def stop(self, reason: str, within_s: float = STOP_S) -> None:  # noqa: ARG002 - as a connection of a device has it
        """The gateway stops."""
        if self.phase is HANDSHAKE:
            self._leave()
            self._abort()

    def configuration_changed(self, services: Services) -> None:
        """What comes after the header is under the configuration that is in force then."""
        self._services = services

    def _end(self, outcome: Outcome, reason: str) -> None:
        self._leave()
        self._failed(outcome, reason)
        self._abort()

    def _leave(self) -> None:
        """End the time without a header, either way."""
        self.phase = GONE
        self._listener.connections -= 1
        self._services.deadlines.discard(self)
        self._services.limits.release_balancer()

    def _hand_over(self, header: ProxyHeader | None) -> None:
        """Let a device's connection take the socket, with what was read of its bytes."""
        assert self._transport is not None
        device = DeviceConnection(self._listener, self._services, header)
        self._transport.set_protocol(device)
        device.connection_made(self._transport)
        rest = self._scanner.rest
        if rest:
            device.data_received(rest)

    def _failed(self, outcome: Outcome, reason: str) -> None:
        self._listener.count_handshake(outcome, "", "")
        if self._services.connection_log.admits(outcome):
            log.info(
                "handshake_failed",
                listener=self._listener.name,
                address=self._address,
                outcome=outcome.value,
                reason=reason,
            )

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
