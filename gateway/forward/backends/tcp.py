"""The `tcp` backend: one connection to a plain service for every stream session."""

import asyncio
import random
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gateway.errors import BackendUnavailable

__all__ = ["TcpBackend", "TcpSettings"]

_BACK_OFF_FIRST_S = 0.1
_BACK_OFF_MAX_S = 5.0


def _tcp_url(url: str) -> str:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if (
        parts.scheme != "tcp"
        or not parts.hostname
        or port is None
        or parts.path
        or parts.query
        or parts.username
    ):
        raise ValueError(f"{url!r} is not the URL of a TCP service: write tcp://host:port")
    return url


class TcpSettings(BaseModel):
    """`[backends.NAME]` with `kind = "tcp"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tcp"]
    url: Annotated[str, AfterValidator(_tcp_url), Field(description="The service, as tcp://host:port.")]
    connect_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=300,
            description="Seconds that a session waits for its connection to the service, further tries included. Ten "
            "outlast a restart of most services; then the device is told to come again.",
        ),
    ] = 10.0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port


class TcpBackend:
    """Connects sessions to the service. While it is away, all sessions of the worker wait on one back-off."""

    def __init__(self, name: str, settings: TcpSettings) -> None:
        self.name = name
        self._settings = settings
        self._host, self._port = settings.address
        self._back_off_s = 0.0
        self._next_try_at = 0.0

    async def connect(self, protocol: asyncio.BaseProtocol) -> None:
        """Connect `protocol` to the service.

        Tries again with exponential back-off and jitter until `connect_timeout_s` has passed, then raises
        BackendUnavailable. Cancelling leaves nothing open.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._settings.connect_timeout_s
        reason = "no time left"
        while True:
            wait_s = self._next_try_at - loop.time()
            if wait_s > 0:
                wait_s *= random.uniform(1, 1.5)  # noqa: S311 - spreads load, guards nothing
                if loop.time() + wait_s >= give_up_at:
                    break
                await asyncio.sleep(wait_s)
            try:
                async with asyncio.timeout_at(give_up_at):
                    await loop.create_connection(lambda: protocol, self._host, self._port)
            except TimeoutError:
                reason = "it does not answer"
            except OSError as exc:
                reason = exc.strerror or str(exc)
            else:
                self._back_off_s = 0.0
                return
            self._failed(loop.time())
            if loop.time() >= give_up_at:
                break
        raise BackendUnavailable(f"no connection to {self._host}:{self._port}: {reason}")

    def _failed(self, now: float) -> None:
        """Wait longer before the next try, unless a failure of the same moment has seen to that already."""
        if now >= self._next_try_at:
            self._back_off_s = min(max(self._back_off_s * 2, _BACK_OFF_FIRST_S), _BACK_OFF_MAX_S)
            self._next_try_at = now + self._back_off_s
