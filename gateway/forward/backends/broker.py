"""What the backends with a connection share: settings of TLS and credentials, the connection itself, attributes.

Theory of operation of `Link`. A connection is made when it is needed, by a task that outlives whoever waits for it: a
delivery that is cancelled while connecting leaves nothing half open, the next one goes on waiting for the same task.
A connection on which anything went wrong, a cancelled delivery included, is dropped and never used again, so that no
late answer is taken for that of a later message. There is no back-off here: the caller decides when to try again.
"""

import asyncio
import contextlib
import importlib.util
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Generic, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from gateway.errors import BackendError, BackendRefused, BackendUnavailable
from gateway.forward.message import Message
from gateway.forward.receipt import Receipt
from gateway.forward.secrets import Secret
from gateway.forward.template import Template
from gateway.wire.cloudevents import EVENT_TYPE

__all__ = [
    "BackendModel",
    "BrokerSettings",
    "BrokerUrl",
    "CredentialSettings",
    "FilePath",
    "Link",
    "Outcomes",
    "TlsSettings",
    "event_attributes",
    "masked",
    "os_error_text",
    "parse_broker_url",
    "percent_encoded",
    "plain",
    "render_all",
    "require_library",
]

T = TypeVar("T")


# Settings


class BackendModel(BaseModel):
    """What the settings of all kinds share."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _resolve_path(path: str | None, info: ValidationInfo) -> str | None:
    if path is None:
        return None
    context = info.context if isinstance(info.context, dict) else {}
    return str((Path(context.get("base", ".")) / path).absolute())


FilePath = Annotated[str | None, Field(min_length=1), AfterValidator(_resolve_path)]
"""A path that is relative to the folder of gateway.toml."""


class TlsSettings(BackendModel):
    """How TLS towards a backend is set up. When renewed files are read is up to the kind: `tls_context` reads them, and `http`
    keeps what it gave for all its connections.
    """

    ca_file: Annotated[
        FilePath,
        Field(
            description="Certificates (PEM) that the backend's must be signed by. Default: those of the system."
        ),
    ] = None
    cert_file: Annotated[
        FilePath, Field(description="Certificate chain (PEM) that the gateway shows, for mutual TLS.")
    ] = None
    key_file: Annotated[
        FilePath,
        Field(description="Private key (PEM, not encrypted) of `cert_file`. Default: it stands in there."),
    ] = None

    @model_validator(mode="after")
    def _key_needs_certificate(self) -> Self:
        if self.key_file and not self.cert_file:
            raise ValueError("key_file is given without cert_file: add the certificate of this key")
        return self

    def check_tls_is_used(self, *, uses_tls: bool, how: str) -> None:
        """Raise ValueError when files are given and the connection is plain."""
        if not uses_tls and (self.ca_file or self.cert_file):
            raise ValueError(f"ca_file and cert_file have no effect without TLS: write {how}")

    def tls_context(self, backend: str) -> ssl.SSLContext:
        """A client's context that checks certificate and host name. Raises BackendUnavailable."""
        if self.ca_file and not Path(self.ca_file).is_file():
            raise BackendUnavailable(f"backend {backend}: ca_file {self.ca_file} does not exist")
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ValueError) as exc:
            raise BackendUnavailable(
                f"backend {backend}: ca_file {self.ca_file} holds no readable certificates: {os_error_text(exc)}"
            ) from exc
        if self.cert_file:
            # Asked for when a key is encrypted; without an answer OpenSSL would ask on the terminal.
            no_password: Callable[[], str] = lambda: ""  # noqa: E731 -- a typed argument, not a function of its own
            try:
                context.load_cert_chain(self.cert_file, self.key_file, no_password)
            except (OSError, ValueError) as exc:
                raise BackendUnavailable(
                    f"backend {backend}: cert_file {self.cert_file} and its key cannot be used: {os_error_text(exc)}"
                ) from exc
        return context


class CredentialSettings(BackendModel):
    """A user name and a password beside the URL."""

    username: Annotated[
        str | None, Field(min_length=1, description="User name, unless it stands in the URL.")
    ] = None
    password: Annotated[
        Secret | None,
        Field(
            min_length=1,
            description="Password, unless it stands in the URL; or `password_file`, a file that holds it.",
        ),
    ] = None

    @model_validator(mode="after")
    def _password_needs_user(self) -> Self:
        if self.password is not None and self.username is None and self._user_is_required():
            raise ValueError("password is given without username: add the user")
        return self

    @classmethod
    def _user_is_required(cls) -> bool:
        return True


class BrokerSettings(CredentialSettings, TlsSettings):
    """One connection to a broker, by URL. A kind says which schemes it knows, and which library it needs."""

    library: ClassVar[str]
    extra: ClassVar[str]
    ports: ClassVar[dict[str, int]]
    """scheme -> default port; the second scheme is the one with TLS"""
    path_allowed: ClassVar[bool] = False

    url: Annotated[str, Field(min_length=1, repr=False)]
    connect_timeout_s: Annotated[
        float, Field(gt=0, le=300, description="Seconds that a connection may take, TLS and login included.")
    ] = 10.0

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        require_library(self.library, self.extra)
        try:
            address = self.address
        except ValueError as exc:
            raise ValueError(f"url {exc}") from None
        _, tls_scheme = self.ports
        self.check_tls_is_used(uses_tls=address.scheme == tls_scheme, how=f"{tls_scheme}:// in url")
        return self

    @property
    def address(self) -> "BrokerUrl":
        """The URL taken apart."""
        return parse_broker_url(self.url, self.ports, path_allowed=self.path_allowed)


def plain(secret: Secret | None) -> str | None:
    """What a secret setting holds."""
    return None if secret is None else secret.get_secret_value()


class BrokerUrl(NamedTuple):
    """A URL taken apart; credentials are percent-decoded."""

    scheme: str
    host: str
    port: int
    username: str | None
    password: str | None
    path: str


def parse_broker_url(url: str, ports: dict[str, int], *, path_allowed: bool = False) -> BrokerUrl:
    """Take a URL of one of the schemes in `ports` (scheme -> default port) apart.

    Raises ValueError, whose text does not repeat the URL: it may hold a password.
    """
    schemes = " or ".join(f"{scheme}://host" for scheme in ports)
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname
    except ValueError:
        raise ValueError(
            f"is not a URL: write {schemes}; special characters of a password percent-encoded"
        ) from None
    if parts.scheme not in ports:
        raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in ports)}")
    if not host or any(character.isspace() for character in url):
        raise ValueError(f"names no host: write {schemes}")
    if (parts.path.strip("/") and not path_allowed) or parts.query or parts.fragment:
        raise ValueError("has something after the host and port: remove it")
    return BrokerUrl(
        parts.scheme,
        host,
        port or ports[parts.scheme],
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        unquote(parts.path),
    )


def require_library(module: str, extra: str) -> None:
    """Raise ValueError when the client library of a kind is not installed."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ValueError(
            f"needs the Python library {module}, which is not installed: pip install 'psk-gateway[{extra}]'"
        )


# The connection


class Link(Generic[T]):
    """One connection to a backend, made when it is needed, dropped when anything went wrong.

    `faults` are what the library raises for a backend that is away or misbehaves; `explain` puts one into words.
    `secrets` never stand in an error.
    """

    def __init__(
        self,
        backend: str,
        connect: Callable[[], Awaitable[T]],
        disconnect: Callable[[T], Awaitable[None]],
        *,
        faults: Callable[[], tuple[type[BaseException], ...]],
        connect_timeout_s: float,
        where: str,
        secrets: Iterable[str | None] = (),
        explain: Callable[[BaseException], str] = str,
    ) -> None:
        self._backend = backend
        self._connect = connect
        self._disconnect = disconnect
        self._faults = faults
        self._connect_timeout_s = connect_timeout_s
        self._where = where
        self._secrets = tuple(secret for secret in secrets if secret)
        self._explain = explain
        self._connection: T | None = None
        self._connecting: asyncio.Task[T] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect now. Raises BackendUnavailable."""
        await self._get()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[T]:
        """The connection. When the block does not end well, it is dropped; the library's errors become
        BackendUnavailable.
        """
        connection = await self._get()
        try:
            yield connection
        except BackendError:
            self.drop(connection)
            raise
        except self._faults() as exc:
            self.drop(connection)
            raise self.unavailable(exc) from exc
        except BaseException:
            self.drop(connection)
            raise

    def drop(self, connection: T) -> None:
        """Use this connection no more; it is closed in the background."""
        if self._connection is connection:
            self._connection = None
        task = asyncio.get_running_loop().create_task(self._end(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def unavailable(self, exc: BaseException) -> BackendUnavailable:
        """An error of the library in one line, without secrets."""
        text = " ".join(masked(self._explain(exc) or type(exc).__name__, self._secrets).split())
        return BackendUnavailable(f"backend {self._backend}: {self._where}: {text}")

    async def close(self) -> None:
        """Let go of everything. Closing twice is allowed."""
        if self._connecting is not None:
            connecting, self._connecting = self._connecting, None
            connecting.cancel()
            await asyncio.wait([connecting])
            if not connecting.cancelled() and connecting.exception() is None:
                self._connection = connecting.result()
        if self._connection is not None:
            self.drop(self._connection)
        if self._closing:
            await asyncio.wait(self._closing)

    async def _get(self) -> T:
        if self._connection is not None:
            return self._connection
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect_in_time())
            self._connecting.add_done_callback(_retrieve)
        connecting = self._connecting
        await asyncio.wait([connecting])  # which a cancelled caller does not cancel
        if self._connecting is connecting:
            self._connecting = None
        try:
            self._connection = connecting.result()
        except self._faults() as exc:
            raise self.unavailable(exc) from exc
        return self._connection

    async def _connect_in_time(self) -> T:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await self._connect()
        except TimeoutError as exc:
            raise BackendUnavailable(
                f"backend {self._backend}: {self._where}: no answer within {self._connect_timeout_s:g} s"
            ) from exc

    async def _end(self, connection: T) -> None:
        with contextlib.suppress(
            TimeoutError, *self._faults()
        ):  # it may be broken: that is why it is dropped
            async with asyncio.timeout(_DISCONNECT_S):
                await self._disconnect(connection)


_DISCONNECT_S: Final = 2.0
"""An orderly good-bye takes milliseconds; a backend that hangs does not hold up the end of the program."""


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Keep asyncio from complaining when nobody waits any more for a connection that failed."""
    if not task.cancelled():
        task.exception()


def masked(text: str, secrets: Iterable[str]) -> str:
    """`text` without the secrets, also in their percent-encoded form."""
    for secret in filter(None, secrets):
        for form in (secret, quote(secret, safe="")):
            text = text.replace(form, "***")
    return text


def os_error_text(exc: BaseException) -> str:
    """What an OSError or a TLS error says, without numbers and internals."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {exc.verify_message or exc.reason}"
    if isinstance(exc, ssl.SSLError):
        return f"TLS: {(exc.reason or str(exc)).replace('_', ' ').lower()}"
    if isinstance(exc, OSError) and exc.errno and not isinstance(exc, socket.gaierror):
        return os.strerror(exc.errno)  # which asyncio replaces by a text of its own
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__


# Messages


def event_attributes(message: Message) -> dict[str, str]:
    """The attributes of the CloudEvent but for `datacontenttype`, in their canonical string form."""
    return {
        "specversion": "1.0",
        "id": message.event_id,
        "source": message.source,
        "type": EVENT_TYPE,
        "time": datetime.fromtimestamp(message.received_at, UTC).isoformat().replace("+00:00", "Z"),
        "realm": message.realm,
        "device": message.device,
        "sequence": f"{message.sequence:020d}",
    }


def percent_encoded(value: str) -> str:
    """A header value after the HTTP binding of CloudEvents 1.0.2, section 3.1.3.2: printable ASCII without space, quote
    and percent stays, of the rest each byte of UTF-8 becomes %XY.
    """
    return quote(value, safe=_HEADER_SAFE)


_HEADER_SAFE: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


class Outcomes:
    """What became of each message of a batch, gathered in any order, made into a Receipt.

    Only the longest settled prefix counts: what comes after the first unknown message is sent again.
    """

    def __init__(self, batch: int) -> None:
        self._settled = [False] * batch
        self._refused: dict[int, str] = {}
        self._replies: dict[int, bytes] = {}

    def safe(self, index: int, reply: bytes | None = None) -> None:
        """The backend has it."""
        self._settled[index] = True
        if reply is not None:
            self._replies[index] = reply

    def refuse(self, index: int, why: str) -> None:
        """The backend will never take it."""
        self._settled[index] = True
        self._refused[index] = why

    @property
    def open(self) -> list[int]:
        """The messages that nothing is known of, in order."""
        return [index for index, settled in enumerate(self._settled) if not settled]

    def receipt(self, error: BackendUnavailable | None = None) -> Receipt | None:
        """The receipt; `error` says what happened to those that are open. Raises it when none of the first is settled."""
        still_open = self.open
        if not still_open:
            return Receipt(self._refused, self._replies) if self._refused or self._replies else None
        assert error is not None, "a message without an outcome"
        settled = still_open[0]
        if settled == 0:
            raise error
        return Receipt(
            {index: why for index, why in self._refused.items() if index < settled},
            {index: reply for index, reply in self._replies.items() if index < settled},
            settled,
            error,
        )


def render_all(template: Template, batch: Sequence[Message], outcomes: Outcomes) -> list[str]:
    """The template for each message; one that cannot have it is refused, and stands as an empty text."""
    rendered = []
    for index, message in enumerate(batch):
        try:
            rendered.append(template.render(message))
        except BackendRefused as exc:
            outcomes.refuse(index, str(exc))
            rendered.append("")
    return rendered
