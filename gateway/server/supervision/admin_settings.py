"""The settings of the admin endpoint: where it listens, and who may ask it."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from gateway.forward.secrets import Secret
from gateway.server.settings import Address, BindAddress, FolderPath, Settings

__all__ = ["AdminSettings", "AdminTls"]

TOKEN_CHARACTERS_MIN = 16
"""Too many for an attempt at every scrape interval to find it."""
_is_token = re.compile(r"[A-Za-z0-9._~+/-]+=*").fullmatch  # b64token, RFC 6750 section 2.1


def _require_token(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if len(value) < TOKEN_CHARACTERS_MIN or not _is_token(value):
        raise ValueError(
            f"must have {TOKEN_CHARACTERS_MIN} or more letters, digits, '-', '.', '_', '~', '+' or '/', as "
            "`openssl rand -hex 32` prints them"
        )
    return secret


class AdminTls(Settings):
    """`admin.tls`: a certificate of the endpoint, and who may connect. Each path is relative to gateway.toml."""

    certificate_file: Annotated[
        FolderPath,
        Field(description="The endpoint's certificate with its chain, PEM. Read again when it was renewed."),
    ]
    key_file: Annotated[FolderPath, Field(description="Its private key, PEM.")]
    client_ca_file: Annotated[
        FolderPath | None,
        Field(
            description="Authorities of client certificates, PEM: without one of these nobody connects, probes included."
        ),
    ] = None


class AdminSettings(Settings):
    """`[admin]`: where /metrics, /healthz and /readyz are served, for whom, and what a trace may show."""

    bind: Annotated[
        BindAddress,
        Field(
            description="Address of the admin endpoint. The default is this host alone; on any other address it wants "
            "`tls` and `token`."
        ),
    ] = Address("127.0.0.1", 9464)
    tls: Annotated[
        AdminTls | None, Field(description="Certificate and key: HTTPS in place of plain HTTP.")
    ] = None
    token: Annotated[
        Annotated[Secret, AfterValidator(_require_token)] | None,
        Field(description="What /metrics asks for as `Authorization: Bearer TOKEN`. The probes need none."),
    ] = None
    allow_key_log: Annotated[
        bool,
        Field(
            description="Let `trace-device --key-log` write the session keys of the device that it traces: whoever has "
            "them reads what was recorded on the network."
        ),
    ] = False
