"""The seam between a connection and its route: what each may do with the other."""

from typing import Protocol

import msgspec

from gateway.net.poller import Poller

__all__ = ["DeviceEnd", "DeviceInfo", "RouteSession", "StreamEnd"]


class DeviceInfo(msgspec.Struct, frozen=True, gc=False):
    """Who is connected. `session` is a UUIDv7, new for every connection; `peer` and `local` are the addresses of the
    device and of the listener, as far as they are known.
    """

    realm: str
    device: str
    identity: str
    group: str | None
    session: str
    labels: dict[str, str] = {}
    peer: tuple[str, int] | None = None
    local: tuple[str, int] | None = None


class DeviceEnd(Protocol):
    """The device's side of a session, as its route sees it."""

    def send(self, data: bytes) -> None:
        """Send bytes to the device, encrypted; nothing happens after `finish` or when it is gone. Not kept."""

    def finish(self) -> None:
        """Nothing more will be sent: close_notify goes out behind what was sent. Receiving goes on."""

    def close(self) -> None:
        """Like `finish`, and what the device still sends is dropped; soon the connection is gone."""

    def opened(self) -> None:
        """What the device had to say first has come: from now on it has the time of an idle session."""

    def pause_receiving(self) -> None:
        """Read nothing more from the device until `resume_receiving`; what was read already is still given."""

    def resume_receiving(self) -> None:
        """Read from the device again."""


class StreamEnd(DeviceEnd, Protocol):
    """The device's side, as a route sees it that connects each session to a service."""

    @property
    def poller(self) -> Poller:
        """Where its socket stands; that of the service may stand there too."""


class RouteSession(Protocol):
    """What a route does with one device's bytes. None of these waits."""

    @property
    def messages(self) -> int | None:
        """How many messages came in, those that were refused too; None on a route that carries bytes."""

    def device_sent(self, data: bytes) -> None:
        """Decrypted bytes from the device."""

    def device_finished(self, *, orderly: bool) -> None:
        """The device will send nothing more; `orderly` by close_notify, else by a bare FIN. It may still listen."""

    def device_lost(self) -> None:
        """The connection is gone, called exactly once, last. Nothing can be sent any more."""

    def pause_sending(self) -> None:
        """The device reads slowly: send little until `resume_sending`."""

    def resume_sending(self) -> None:
        """The device reads again."""

    def send_command(self, command_id: str, payload: bytes) -> None:
        """Send a command to the device between whatever else it is sent. Raises ControlError when that
        cannot be, LimitReached when it cannot be just now.
        """

    def stop(self) -> None:
        """The gateway ends the session: take no more, settle what is under way, then `DeviceEnd.close`."""
