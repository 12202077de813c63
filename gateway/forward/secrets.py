"""Secrets in settings: masked wherever settings are shown, plain only where a worker is handed its own."""

from typing import Annotated, Final

from pydantic import PlainSerializer, SecretStr, SerializationInfo

__all__ = ["REVEAL", "Secret"]

REVEAL: Final = {"reveal": True}
"""The context of a dump that shows secrets: `settings.model_dump_json(context=REVEAL)`."""


def _serialize(secret: SecretStr, info: SerializationInfo) -> str:
    return secret.get_secret_value() if info.context == REVEAL else "***"


Secret = Annotated[SecretStr, PlainSerializer(_serialize, return_type=str)]
"""A text that is neither printed nor logged. In gateway.toml it can stand in a file of its own, named by `KEY_file`."""
