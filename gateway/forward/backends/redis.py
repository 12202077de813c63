"""Redis streams: one entry per message, added with XADD.

An entry has one field per attribute of the CloudEvent, `datacontenttype` included, and the payload as it came in the
field `data`. There is no CloudEvents binding for Redis; these are the attributes' own names.

A batch is one pipeline on one connection: commands are answered in order, each for itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import (
    BrokerUrl,
    CredentialSettings,
    Link,
    Outcomes,
    TlsSettings,
    event_attributes,
    os_error_text,
    parse_broker_url,
    plain,
    render_all,
    require_library,
)
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from gateway.forward.template import Rules, Template

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisBackend", "RedisSettings"]

STREAM_RULES = Rules("stream", separators=":{}", bytes_max=1024)


class RedisSettings(CredentialSettings, TlsSettings):
    """`[backends.NAME]` with `kind = "redis"`."""

    kind: Literal["redis"]
    url: Annotated[
        str,
        Field(
            min_length=1,
            repr=False,
            description="The server, as redis://host:6379, or rediss:// for TLS; user:password@ and /DATABASE may stand in it.",
        ),
    ]
    stream: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            description="Key of the stream; a template. Values may not hold : { }",
        ),
    ]
    entries_max: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000_000,
            description="About how many entries a stream keeps (MAXLEN ~), the oldest go first. 0: all, without end. "
            "A million of 100 bytes are about 300 MB.",
        ),
    ] = 1_000_000
    connect_timeout_s: Annotated[
        float, Field(gt=0, le=300, description="Seconds that a connection may take, TLS and login included.")
    ] = 10.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_library("redis", "redis")
        try:
            address = self.address
        except ValueError as exc:
            raise ValueError(f"url {exc}") from None
        self.check_tls_is_used(uses_tls=address.scheme == "rediss", how="rediss:// in url")
        if address.path.strip("/") and not address.path.strip("/").isdecimal():
            raise ValueError("url names a database that is no number: write redis://host:6379/0")
        Template(self.stream, STREAM_RULES)
        return self

    @classmethod
    def _user_is_required(cls) -> bool:
        return False

    @property
    def address(self) -> BrokerUrl:
        """The URL taken apart."""
        return parse_broker_url(self.url, {"redis": 6379, "rediss": 6379}, path_allowed=True)


class RedisBackend:
    """The sink of one route in one process."""

    def __init__(self, name: str, settings: RedisSettings, content_type: str, _stdout_lock: Path) -> None:
        self._name = name
        self._settings = settings
        self._content_type = content_type
        self._address = settings.address
        self._stream = Template(settings.stream, STREAM_RULES)
        self._password = plain(settings.password) or self._address.password
        self._link: Link[Redis] = Link(
            name,
            self._connect,
            _disconnect,
            faults=_faults,
            connect_timeout_s=settings.connect_timeout_s,
            where=f"{self._address.host}:{self._address.port}",
            secrets=[self._password],
            explain=_explain,
        )

    async def open(self) -> None:
        """Connect and log in. Raises BackendUnavailable."""
        await self._link.open()

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        """Add the batch, one entry after the other."""
        from redis.exceptions import RedisError

        outcomes = Outcomes(len(batch))
        streams = render_all(self._stream, batch, outcomes)
        waiting = outcomes.open
        if not waiting:
            return outcomes.receipt()
        maxlen = self._settings.entries_max or None
        async with self._link.use() as redis:
            pipeline = redis.pipeline(transaction=False)
            for index in waiting:
                message = batch[index]
                fields: dict[Any, Any] = {
                    **event_attributes(message),
                    "datacontenttype": self._content_type,
                    "data": message.payload,
                }
                pipeline.xadd(streams[index], fields, maxlen=maxlen, approximate=True)
            answers = await pipeline.execute(raise_on_error=False)
        error: BackendUnavailable | None = None
        for index, answer in zip(waiting, answers, strict=True):
            if isinstance(answer, RedisError):
                error = error or self._link.unavailable(answer)
            elif error is None:
                outcomes.safe(index)
        return outcomes.receipt(error)

    async def close(self) -> None:
        """Close the connection. Closing twice is allowed."""
        await self._link.close()

    async def _connect(self) -> "Redis":
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        address, settings = self._address, self._settings
        tls = {}
        if address.scheme == "rediss":
            settings.tls_context(
                self._name
            )  # says more clearly than the library what is wrong with the files
            tls = {
                "ssl": True,
                "ssl_ca_certs": settings.ca_file,
                "ssl_certfile": settings.cert_file,
                "ssl_keyfile": settings.key_file or settings.cert_file,
                "ssl_check_hostname": True,
            }
        redis = Redis(
            host=address.host,
            port=address.port,
            db=int(address.path.strip("/") or 0),
            username=settings.username or address.username,
            password=self._password,
            socket_connect_timeout=settings.connect_timeout_s,
            retry=Retry(NoBackoff(), 0),  # an XADD that was sent twice is a duplicate; the caller decides
            single_connection_client=True,
            **tls,  # type: ignore[arg-type]  # a dictionary of different types
        )
        try:
            await redis.initialize()
            await redis.ping()
        except BaseException:
            await redis.aclose()
            raise
        return redis


async def _disconnect(redis: "Redis") -> None:
    await redis.aclose()


def _faults() -> tuple[type[BaseException], ...]:
    from redis.exceptions import RedisError

    return RedisError, OSError, ValueError, IndexError  # the last two from answers that are no Redis protocol


def _explain(exc: BaseException) -> str:
    from redis.exceptions import AuthenticationError, InvalidResponse

    if isinstance(exc, AuthenticationError) or str(exc).startswith(("WRONGPASS", "NOAUTH")):
        return "it does not accept the user name and password: check username, password and url"
    if isinstance(exc, InvalidResponse | ValueError | IndexError):
        return "it does not speak the Redis protocol"
    return os_error_text(exc.__cause__ if isinstance(exc.__cause__, OSError) else exc)
