"""An mqtt route: the device's CONNECT is read and written anew, after it bytes flow to the broker and back untouched.

Theory of operation. Who the device is, TLS-PSK has proved. So its CONNECT gets the name of the device as user name, the
password that the gateway shares with the broker, and a client id that begins with realm and device; will, keep-alive,
properties and session flags stay as they are. Only then the broker is connected to, and a `Relay` takes over. A second
CONNECT is for the broker to refuse, as it must ([MQTT-3.1.0-2]).

Until the CONNECT is whole the session holds at most CONNECT_BYTES_MAX, and the deadline of the first message goes on
whatever trickles in. A CONNECT that is refused is answered as MQTT has it, and counted as one message.
"""

import dataclasses
from collections.abc import Callable
from typing import Final, Protocol

from gateway.errors import BackendUnavailable, ControlError
from gateway.forward.relay import Relay
from gateway.forward.session import DeviceEnd, DeviceInfo
from gateway.wire.framing import Reason
from gateway.wire.mqtt_connect import (
    Connect,
    ConnectError,
    ConnectFault,
    ConnectScanner,
    encode_connack,
    encode_connect,
    scoped_client_id,
)

__all__ = ["MqttLog", "MqttSession"]

_WILDCARDS: Final = frozenset("+#")
"""Brokers put user names into topic patterns of their access lists; with one of these a name would match others'."""

_REASONS: Final = {
    ConnectFault.NOT_MQTT: Reason.INVALID,
    ConnectFault.MALFORMED: Reason.INVALID,
    ConnectFault.VERSION: Reason.INVALID,
    ConnectFault.CLIENT_ID: Reason.TOO_LONG,
    ConnectFault.TOO_LARGE: Reason.TOO_LONG,
    ConnectFault.NOT_AUTHORIZED: Reason.REFUSED,
    ConnectFault.UNAVAILABLE: Reason.UNAVAILABLE,
}


class MqttLog(Protocol):
    """What becomes of CONNECT packets and of connections to the broker, for log and metrics."""

    def connect_received(self) -> None:
        """A CONNECT came in, good or bad."""

    def connect_refused(self, info: DeviceInfo, reason: Reason, detail: str) -> None:
        """It was refused, or never came."""

    def backend_connected(self, duration_s: float) -> None:
        """The broker took the connection."""

    def backend_failed(self, duration_s: float, error: BackendUnavailable) -> None:
        """It did not."""


class MqttSession:
    """One session of an mqtt route, a `RouteSession`.

    `password` is what the broker knows the gateway by, None for none. `begin` is given the relay once the CONNECT is
    in it, and has to connect it.
    """

    __slots__ = ("_begin", "_device", "_info", "_level", "_log", "_over", "_password", "_relay", "_scanner")
    messages: Final = None  # the broker's to count

    def __init__(
        self,
        device: DeviceEnd,
        info: DeviceInfo,
        log: MqttLog,
        *,
        password: str | None,
        begin: Callable[[Relay], None],
    ) -> None:
        self._device = device
        self._info = info
        self._log = log
        self._password = password
        self._begin = begin
        self._scanner: ConnectScanner | None = ConnectScanner()
        self._relay: Relay | None = None
        self._level = 0
        self._over = False

    # From the device

    def device_sent(self, data: bytes) -> None:
        """Pass bytes on, once the CONNECT is through."""
        if self._relay is not None:
            self._relay.device_sent(data)
        elif not self._over:
            self._read_connect(data)

    def device_finished(self, *, orderly: bool) -> None:
        """Pass the end on."""
        if self._relay is not None:
            self._relay.device_finished(orderly=orderly)
        else:
            self._device.close()

    def device_lost(self) -> None:
        """Let the broker know: it may have a will to publish."""
        if self._relay is not None:
            self._relay.device_lost()
        elif not self._over:
            self._over = True
            self._log.connect_received()
            self._log.connect_refused(self._info, Reason.INVALID, "no whole CONNECT came")

    def pause_sending(self) -> None:
        """The device reads slowly."""
        if self._relay is not None:
            self._relay.pause_sending()

    def resume_sending(self) -> None:
        """The device reads again."""
        if self._relay is not None:
            self._relay.resume_sending()

    def send_command(self, command_id: str, payload: bytes) -> None:  # noqa: ARG002 - there is no place for one
        """A device with a broker of its own subscribes there."""
        raise ControlError(
            "it is connected on a route with framing = mqtt: publish to a topic that it subscribes to"
        )

    def stop(self) -> None:
        """End both sides."""
        if self._relay is not None:
            self._relay.stop()
        else:
            self._device.close()

    # The CONNECT

    def _read_connect(self, data: bytes) -> None:
        assert self._scanner is not None
        try:
            connect = self._scanner.feed(data)
            if connect is None:
                return
            rewritten = self._rewrite(connect)
        except ConnectError as refused:
            self._log.connect_received()
            self._refuse(refused)
            return
        self._log.connect_received()
        self._level = connect.level
        rest, self._scanner = self._scanner.rest, None
        self._device.opened()
        self._relay = relay = Relay(self._device, self)
        relay.device_sent(rewritten)
        if rest:
            relay.device_sent(rest)
        self._begin(relay)

    def _rewrite(self, connect: Connect) -> bytes:
        """The CONNECT as the broker gets it."""
        info = self._info
        if not _WILDCARDS.isdisjoint(info.device):
            raise ConnectError(
                ConnectFault.NOT_AUTHORIZED,
                connect.level,
                "a device whose name has + or # gets no user name of MQTT",
            )
        return encode_connect(
            dataclasses.replace(
                connect,
                client_id=scoped_client_id(info.realm, info.device, connect.client_id),
                user_name=info.device,
                password=None if self._password is None else self._password.encode(),
            )
        )

    def _refuse(self, refused: ConnectError) -> None:
        """Say why, where MQTT has a code for it, and close."""
        self._over = True
        self._scanner = None
        self._log.connect_refused(self._info, _REASONS[refused.fault], refused.detail)
        connack = encode_connack(refused.fault, refused.level)
        if connack:
            self._device.send(connack)
        self._device.close()

    # From the relay

    def backend_connected(self, duration_s: float) -> None:
        """The broker has the CONNECT."""
        self._log.backend_connected(duration_s)

    def backend_failed(self, duration_s: float, error: BackendUnavailable) -> None:
        """The broker is away: say so before the relay closes the session."""
        self._log.backend_failed(duration_s, error)
        self._refuse(ConnectError(ConnectFault.UNAVAILABLE, self._level, str(error)))
