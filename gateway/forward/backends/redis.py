"""Redis streams: one entry per message, added with XADD.

An entry has one field per attribute of the CloudEvent, `datacontenttype` included, and the payload as it came in the
field `data`. There is no CloudEvents binding for Redis; these are the attributes' own names.

A batch is one pipeline on one connection: commands are answered in order, each for itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from gateway.errors import BackendUnavailable
from gateway.forward.backends.broker import (
    BrokerSettings,
    Outcomes,
    event_attributes,
    os_error_text,
    plain,
)
from gateway.forward.backends.publishing import BrokerSink
from gateway.forward.message import Message
from gateway.forward.template import Rules, Template

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisBackend", "RedisSettings"]

STREAM_RULES = Rules("stream", separators=":{}", bytes_max=1024)


class RedisSettings(BrokerSettings):
    """`[backends.NAME]` with `kind = "redis"`."""

    library = "redis"
    extra = "redis"
    ports: ClassVar = {"redis": 6379, "rediss": 6379}
    path_allowed = True

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

    @model_validator(mode="after")
    def _check(self) -> Self:
        database = self.address.path.strip("/")
        if database and not database.isdecimal():
            raise ValueError("url names a database that is no number: write redis://host:6379/0")
        Template(self.stream, STREAM_RULES)
        return self

    @classmethod
    def _user_is_required(cls) -> bool:
        return False


class RedisBackend(BrokerSink["Redis"]):
    """The sink of one route in one process."""

    def __init__(self, name: str, settings: RedisSettings, content_type: str, _stdout_lock: Path) -> None:
        template = Template(settings.stream, STREAM_RULES)
        super().__init__(name, settings, template, _disconnect, faults=_faults, explain=_explain)
        self._settings = settings
        self._content_type = content_type
        self._address = settings.address

    async def _publish(
        self,
        connection: "Redis",
        batch: Sequence[Message],
        places: Sequence[str],
        outcomes: Outcomes,
        some: Sequence[int],
    ) -> BackendUnavailable | None:
        from redis.exceptions import RedisError

        maxlen = self._settings.entries_max or None
        pipeline = connection.pipeline(transaction=False)
        for index in some:
            message = batch[index]
            fields: dict[Any, Any] = {
                **event_attributes(message),
                "datacontenttype": self._content_type,
                "data": message.payload,
            }
            pipeline.xadd(places[index], fields, maxlen=maxlen, approximate=True)
        answers = await pipeline.execute(raise_on_error=False)
        error: BackendUnavailable | None = None
        for index, answer in zip(some, answers, strict=True):
            if isinstance(answer, RedisError):
                error = error or self._link.unavailable(answer)
            elif error is None:
                outcomes.safe(index)
        return error

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
            password=plain(settings.password) or address.password,
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
