"""How keys are written in files. The same characters are different bytes to different products, so it is always said."""

import base64
import binascii
import re
from typing import Final, Literal

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.sealing import Key

__all__ = ["KeyEncoding", "can_encode_key", "decode_key", "encode_key"]

KeyEncoding = Literal["hex", "base64", "text", "hex-or-text"]
"""`text` is the bytes of the text itself; `hex-or-text` is hex where it looks like it (pairs of digits, colons between
them or not), as stunnel takes it."""

_LOOKS_LIKE_HEX: Final = re.compile(r":*(?:[0-9A-Fa-f]{2}:*)+")
_PRINTABLE: Final = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


def decode_key(text: str, encoding: KeyEncoding) -> Key:
    """Raises RegistryRefused, without a word of the key."""
    if encoding == "hex-or-text":
        is_hex = _LOOKS_LIKE_HEX.fullmatch(text) is not None
        text, encoding = (text.replace(":", ""), "hex") if is_hex else (text, "text")
    if encoding == "hex":
        return identities.parse_key_hex(text)
    if encoding == "text":
        return identities.check_key(Key(text.encode()))
    try:
        raw = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as exc:  # ValueError: not ASCII
        raise RegistryRefused("the key is not base64") from exc
    return identities.check_key(Key(raw))


def encode_key(key: Key, encoding: KeyEncoding) -> str:
    """A key that `can_encode_key`."""
    if encoding == "base64":
        return base64.b64encode(key.reveal()).decode("ascii")
    return key.reveal().decode("ascii") if encoding == "text" else key.hex()


def can_encode_key(key: Key, encoding: KeyEncoding) -> bool:
    """Only printable text can be written as text; everything else takes any key."""
    return encoding != "text" or _PRINTABLE.fullmatch(key.reveal()) is not None
