"""The tables [[routes]] and [backends.NAME] of gateway.toml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from gateway.forward.backends.file import FileSettings
from gateway.forward.backends.tcp import TcpSettings

__all__ = ["BackendSettings", "RouteMatch", "RouteSettings"]

BackendSettings = Annotated[FileSettings | TcpSettings, Field(discriminator="kind")]
"""One backend; `kind` says which settings it has."""

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", strict=True)
]
"""A name that stands in log lines and metric labels."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=255)]

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 -- a grammar rule of RFC 9110 section 5.6.2, no password
MediaType = Annotated[
    str,
    StringConstraints(
        max_length=255, pattern=rf'^{_TOKEN}/{_TOKEN}( *; *{_TOKEN}=({_TOKEN}|"[^"\\\x00-\x1f\x7f]*"))*$'
    ),
]
"""A media type with optional parameters (RFC 9110 section 8.3.1)."""


class RouteMatch(BaseModel):
    """`match` of a route: a session matches when everything that is given here does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    realm: Annotated[Text | None, Field(description="The realm of the device.")] = None
    group: Annotated[Text | None, Field(description="The group of the device.")] = None
    identity: Annotated[
        Text | None,
        Field(
            description="A pattern for the whole identity: `*` any characters, `?` one, `[a-f]` one of these. "
            "Upper and lower case differ."
        ),
    ] = None
    listener: Annotated[Name | None, Field(description="The listener that the device connected to.")] = None
    alpn: Annotated[Text | None, Field(description="The protocol agreed on by ALPN.")] = None


class RouteSettings(BaseModel):
    """`[[routes]]`: what happens to the payloads of the sessions that match. The first route that matches counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[Name, Field(description="Name of the route, the label `route` of its metrics.")]
    match: Annotated[
        RouteMatch, Field(description="Which sessions take this route. Default: all of them.")
    ] = RouteMatch()
    framing: Annotated[
        Literal["stream", "lines"],
        Field(
            description="`stream`: bytes flow both ways between device and backend. `lines`: each line is a message."
        ),
    ]
    delivery: Annotated[
        Literal["direct"], Field(description="`direct`: a message is safe when the backend has confirmed it.")
    ] = "direct"
    ack: Annotated[
        bool | None,
        Field(
            description="Whether each message that is safe is answered `ok N`. Default: yes, where the backend "
            "confirms."
        ),
    ] = None
    reply: Annotated[bool, Field(description="Whether the backend's answer goes back to the device.")] = False
    content_type: Annotated[
        MediaType,
        Field(
            description="What the payloads are: it decides how they are checked and "
            "how they stand in an event."
        ),
    ] = "application/octet-stream"
    backend: Annotated[Name, Field(description="Name of the backend, as in `[backends.NAME]`.")]
