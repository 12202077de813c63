"""HTTP: events in POST requests over a pool of kept connections, after the HTTP binding of CloudEvents 1.0.2.

`mode`: `batch` posts a JSON array of events, `structured` one event in JSON per request, `binary` the payload as the
body and the attributes as `ce-` headers. A 2xx answer, read to its end, makes a message safe.

In the modes with one request per message the requests of one session follow one another, those of different sessions
run side by side, `connections` at most.

What an answer means (RFC 9110): 2xx safe; 408, 425, 429 and 5xx come again later, not before `Retry-After`; 401, 403,
404 and the like are for an operator to repair, so the message is kept as well; every other 4xx says that this message
will never be taken. Redirects are not followed.
"""

import asyncio
import base64
import email.utils
import hashlib
import hmac
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from gateway.errors import BackendRefused, BackendUnavailable
from gateway.forward.backends.broker import (
    CredentialSettings,
    Outcomes,
    TlsSettings,
    event_attributes,
    masked,
    os_error_text,
    percent_encoded,
    plain,
)
from gateway.forward.message import Message, encode_message
from gateway.forward.receipt import Receipt
from gateway.forward.secrets import Secret
from gateway.forward.template import Rules, Template
from gateway.net.address import address_text
from gateway.wire.cloudevents import payload_kind

if TYPE_CHECKING:
    import aiohttp

__all__ = ["SIGNATURE_HEADER", "HttpBackend", "HttpSettings", "sign"]

SIGNATURE_HEADER: Final = "X-PSKGW-Signature"
HEADER_RULES = Rules(
    "header",
    separators="",
    bytes_max=4096,
    legal=r"[\x20-\x7e]*",
    legal_text="only printable ASCII is allowed",
)
HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OWN_HEADERS: Final = frozenset(
    {
        "content-type",
        "content-length",
        "transfer-encoding",
        "host",
        "connection",
        "authorization",
        "x-pskgw-signature",
    }
)
TRY_AGAIN: Final = frozenset({408, 425, 429})
FOR_THE_OPERATOR: Final = frozenset({401, 403, 404, 405, 407, 421})


class HttpSettings(CredentialSettings, TlsSettings):
    """`[backends.NAME]` with `kind = "http"`."""

    kind: Literal["http"]
    url: Annotated[
        str,
        Field(
            min_length=1,
            repr=False,
            description="Where events are posted to: http:// or https://; user:password@ (basic authentication) may "
            "stand in it.",
        ),
    ]
    mode: Annotated[
        Literal["batch", "binary", "structured"],
        Field(
            description="`batch`: a JSON array of events per request. `structured`: one event in JSON. `binary`: the "
            "payload as the body, the attributes as headers."
        ),
    ] = "batch"
    token: Annotated[
        Secret | None,
        Field(min_length=1, description="Bearer token for the header Authorization; or `token_file`."),
    ] = None
    secret: Annotated[
        Secret | None,
        Field(
            min_length=16,
            description="Key of the HMAC-SHA256 signature in the header X-PSKGW-Signature, 16 characters at least; or "
            "`secret_file`. Without it nothing is signed.",
        ),
    ] = None
    headers: Annotated[
        dict[str, str],
        Field(
            default_factory=dict,
            description="More headers; values are templates, in mode `batch` without placeholders. Secrets belong into "
            "`token` or `password`, which are masked.",
        ),
    ]
    connections: Annotated[
        int, Field(ge=1, le=1000, description="Connections of one worker to the service at most.")
    ] = 8
    reply_bytes_max: Annotated[
        int,
        Field(
            ge=0, le=16 * 1024 * 1024, description="Longest body that a reply to a device may have, in bytes."
        ),
    ] = 65_536
    connect_timeout_s: Annotated[
        float, Field(gt=0, le=300, description="Seconds that a connection may take, TLS included.")
    ] = 10.0
    request_timeout_s: Annotated[
        float,
        Field(gt=0, le=3600, description="Seconds from a request to the end of its answer."),
    ] = 20.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        from yarl import URL

        try:
            url = URL(self.url)
            scheme, host = url.scheme, url.host
        except ValueError:
            raise ValueError("url is not a URL: write https://host/path") from None
        if scheme not in {"http", "https"} or not host:
            raise ValueError("url must be http://host/path or https://host/path")
        self.check_tls_is_used(uses_tls=scheme == "https", how="https:// in url")
        if self.token and (self.username or url.user):
            raise ValueError("token and a user name are given: keep one of the two")
        for name, text in self.headers.items():
            if (
                not HEADER_NAME.fullmatch(name)
                or name.lower() in OWN_HEADERS
                or name.lower().startswith("ce-")
            ):
                raise ValueError(f"headers: {name!r} is no name for a header of yours: choose another")
            try:
                template = Template(text, HEADER_RULES)
            except ValueError as exc:
                raise ValueError(f"headers.{name} {exc}") from None
            if self.mode == "batch" and not template.is_constant:
                raise ValueError(
                    f"headers.{name} has a placeholder, and a batch has many devices: use mode binary or structured"
                )
        return self

    @property
    def replies(self) -> bool:
        """Whether there is an answer for each message."""
        return self.mode != "batch"


def sign(secret: bytes, at: int, headers: Mapping[str, str], body: bytes) -> str:
    """The value of the signature header: `t=UNIX,v1=HEX`.

    HEX is the HMAC-SHA256 of: the time in digits, a dot, in mode `binary` a line `name:value` plus line feed for each
    `ce-` header, sorted by name, then the body. So a signature covers who sent what and when.
    """
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers) if name.startswith("ce-"))
    digest = hmac.new(secret, f"{at}.{lines}".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class HttpBackend:
    """The sink of one route in one process."""

    def __init__(self, name: str, settings: HttpSettings, content_type: str, _stdout_lock: Path) -> None:
        from yarl import URL

        self._name = name
        self._settings = settings
        self._content_type = content_type
        self._kind = payload_kind(content_type)
        url = URL(settings.url)
        self._url = url.with_user(None)
        assert url.host is not None
        assert url.port is not None
        self._host, self._port = url.host, url.port
        self._where = address_text(url.host, url.port)
        self._user = settings.username or url.user
        self._password = plain(settings.password) or url.password or ""
        self._secret = (plain(settings.secret) or "").encode()
        self._headers = {name: Template(text, HEADER_RULES) for name, text in settings.headers.items()}
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """See whether the service takes a connection. Raises BackendUnavailable."""
        context = self._settings.tls_context(self._name) if self._url.scheme == "https" else None
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                _, writer = await asyncio.open_connection(self._host, self._port, ssl=context)
        except OSError as exc:
            raise self._unavailable(exc) from exc
        writer.transport.abort()

    async def deliver(self, batch: Sequence[Message]) -> Receipt | None:
        """Post the batch; what an answer means stands at the top."""
        if self._settings.mode == "batch":
            events = [encode_message(message, self._content_type, self._kind) for message in batch]
            headers = {name: template.render(batch[0]) for name, template in self._headers.items()}
            headers["Content-Type"] = "application/cloudevents-batch+json; charset=UTF-8"
            await self._post(headers, b"[" + b",".join(events) + b"]")
            return None
        outcomes = Outcomes(len(batch))
        sessions: dict[str, list[int]] = {}
        for index, message in enumerate(batch):
            sessions.setdefault(message.session, []).append(index)
        lines = iter(sessions.values())
        errors: list[BackendUnavailable] = []

        async def work() -> None:
            for line in lines:  # shared: each worker takes the next session
                for index in line:
                    if errors:
                        return
                    try:
                        outcomes.safe(index, await self._post_one(batch[index]))
                    except BackendRefused as exc:
                        outcomes.refuse(index, str(exc))
                    except BackendUnavailable as exc:
                        errors.append(exc)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self._settings.connections, len(sessions))):
                tasks.create_task(work())
        return outcomes.receipt(errors[0] if errors else None)

    async def close(self) -> None:
        """Close the connections. Closing twice is allowed."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post_one(self, message: Message) -> bytes:
        headers = {name: template.render(message) for name, template in self._headers.items()}
        if self._settings.mode == "binary":
            headers["Content-Type"] = self._content_type
            for key, value in event_attributes(message).items():
                headers[f"ce-{key}"] = percent_encoded(value)
            return await self._post(headers, message.payload)
        headers["Content-Type"] = "application/cloudevents+json; charset=UTF-8"
        return await self._post(headers, encode_message(message, self._content_type, self._kind))

    async def _post(self, headers: dict[str, str], body: bytes) -> bytes:
        """One request. Raises BackendRefused or BackendUnavailable."""
        import aiohttp

        if self._secret:
            headers[SIGNATURE_HEADER] = sign(self._secret, int(time.time()), headers, body)
        session = self._session or self._new_session()
        try:
            try:
                status, retry_after, reply = await self._exchange(session, headers, body)
            except aiohttp.ServerDisconnectedError:
                # A kept connection that the service closed in the same moment; asked again on another, once.
                status, retry_after, reply = await self._exchange(session, headers, body)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise self._unavailable(exc) from exc
        self._judge(status, retry_after, reply)
        return reply

    async def _exchange(
        self, session: "aiohttp.ClientSession", headers: dict[str, str], body: bytes
    ) -> tuple[int, str | None, bytes]:
        async with session.post(self._url, data=body, headers=headers, allow_redirects=False) as answer:
            reply = bytearray()
            async for piece in answer.content.iter_any():
                reply += piece
                if len(reply) > self._settings.reply_bytes_max + ANSWER_SLACK_BYTES:
                    answer.close()
                    break
            return answer.status, answer.headers.get("Retry-After"), bytes(reply)

    def _judge(self, status: int, retry_after: str | None, reply: bytes) -> None:
        said = f"backend {self._name}: {self._where} answers {status}"
        if 200 <= status < 300:  # noqa: PLR2004 -- HTTP's own numbers
            if self._settings.replies and len(reply) > self._settings.reply_bytes_max:
                raise BackendRefused(
                    f"{said} with more than reply_bytes_max = {self._settings.reply_bytes_max}"
                )
            return
        if status in TRY_AGAIN or status >= 500:  # noqa: PLR2004
            raise BackendUnavailable(said, _seconds(retry_after, time.time()))
        if status in FOR_THE_OPERATOR:
            what = "check the credentials" if status in {401, 403, 407} else "check the URL"
            raise BackendUnavailable(f"{said}: {what}")
        if status < 400:  # noqa: PLR2004
            raise BackendUnavailable(f"{said}: redirects are not followed, write the final URL")
        raise BackendRefused(said)

    def _new_session(self) -> "aiohttp.ClientSession":
        import aiohttp

        settings = self._settings
        tls = settings.tls_context(self._name) if self._url.scheme == "https" else True
        headers = {"User-Agent": "psk-gateway", "Accept-Encoding": "identity"}
        if token := plain(settings.token):
            headers["Authorization"] = f"Bearer {token}"
        elif self._user:
            pair = f"{self._user}:{self._password}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=settings.connections, ssl=tls, keepalive_timeout=KEEP_ALIVE_S
            ),
            timeout=aiohttp.ClientTimeout(
                total=settings.request_timeout_s, sock_connect=settings.connect_timeout_s
            ),
            headers=headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self._session

    def _unavailable(self, exc: BaseException) -> BackendUnavailable:
        text = masked(_explain(exc), [self._password, plain(self._settings.token) or ""])
        return BackendUnavailable(f"backend {self._name}: {self._where}: {' '.join(text.split())}")


KEEP_ALIVE_S: Final = 15.0
"""Services close idle connections after a minute or so; ours are gone before."""
ANSWER_SLACK_BYTES: Final = 65_536
"""What of an answer is read although nobody wants it, so that its connection can be kept."""


def _explain(exc: BaseException) -> str:
    import aiohttp

    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return os_error_text(exc.certificate_error)
    if isinstance(exc, aiohttp.ClientConnectorError):
        return os_error_text(exc.os_error)
    for kind, text in (
        (TimeoutError, "no answer in time"),
        (aiohttp.ServerDisconnectedError, "it closed the connection instead of answering"),
        (aiohttp.ClientPayloadError, "its answer is cut off"),
        ((aiohttp.ClientResponseError, ValueError), "its answer is not HTTP"),
    ):
        if isinstance(exc, kind):
            return text
    return os_error_text(exc)


def _seconds(retry_after: str | None, now: float) -> float | None:
    """Retry-After, seconds or a date (RFC 9110 section 10.2.3), as seconds from now; whoever waits bounds it."""
    if not retry_after:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(at - now, 0.0)
