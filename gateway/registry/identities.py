"""Names and keys as people write them, checked once at the edge.

Identities: 1 to 128 bytes of UTF-8 (RFC 4279, 5.1 and 5.3), no control characters (RFC 9813). They are compared byte
by byte and never normalised. Keys: 16 to 64 bytes (RFC 4279, 5.3 and RFC 9813), written as hex.
Every refusal is a `RegistryRefused` with one line that shows neither a key nor raw control characters.
"""

import binascii
import datetime as dt
import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Mapping

from gateway.errors import RegistryRefused
from gateway.registry.records import PskHash
from gateway.registry.sealing import Key

__all__ = [
    "IDENTITY_BYTES_MAX",
    "KEY_BYTES_MAX",
    "KEY_BYTES_MIN",
    "check_key",
    "check_record_bytes",
    "is_identity",
    "parse_device_name",
    "parse_group",
    "parse_hash",
    "parse_hint",
    "parse_identity",
    "parse_key_hex",
    "parse_labels",
    "parse_networks",
    "parse_realm_name",
    "parse_time",
]

IDENTITY_BYTES_MAX = 128
KEY_BYTES_MIN = 16
KEY_BYTES_MAX = 64
_RECORD_BYTES = range(64, 16384 + 1)  # RFC 8449 section 4 has the same bounds
_NAME_CHARACTERS_MAX = 64
_LABEL_VALUE_CHARACTERS_MAX = 256
_LABELS_MAX = 32
_NETWORKS_MAX = 64
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


def parse_identity(text: str) -> str:
    """An identity as it may stand in a ClientHello."""
    return _parse_wire_text("identity", text)


def parse_device_name(text: str) -> str:
    """A device is named by the identity it was added with, so the same rule holds."""
    return _parse_wire_text("device name", text)


def parse_hint(text: str) -> str:
    """A PSK identity hint; an empty one breaks clients, so a realm without hint has None."""
    return _parse_wire_text("hint", text)


def is_identity(raw: bytes) -> bool:
    """Whether bytes from the wire could be an identity at all; nothing is looked up for those that could not."""
    if not 0 < len(raw) <= IDENTITY_BYTES_MAX:
        return False
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return text.isprintable() or not _has_control_characters(text)


def parse_key_hex(text: str) -> Key:
    """A key written as hex digits; white space around them (the line end of a file) is let go."""
    try:
        raw = binascii.unhexlify(text.strip().encode("ascii"))
    except (binascii.Error, UnicodeEncodeError) as exc:
        raise RegistryRefused("the key is not hex: give an even number of the digits 0-9 and a-f") from exc
    return check_key(Key(raw))


def check_key(key: Key) -> Key:
    """The key, when its length is one that TLS-PSK peers must support and that is not too weak."""
    if len(key) < KEY_BYTES_MIN:
        raise RegistryRefused(
            f"the key has {len(key)} bytes: {KEY_BYTES_MIN} to {KEY_BYTES_MAX} are allowed, 32 are advised"
        )
    if len(key) > KEY_BYTES_MAX:
        raise RegistryRefused(f"the key has {len(key)} bytes: at most {KEY_BYTES_MAX} are allowed")
    return key


def parse_hash(text: str) -> PskHash:
    """The hash that a key is bound to in TLS 1.3."""
    if text == "sha256":
        return "sha256"
    if text == "sha384":
        return "sha384"
    raise RegistryRefused(f"hash {_shown(text)} is unknown: it is sha256 or sha384")


def parse_time(text: str) -> dt.datetime:
    """A time with its zone, in UTC; a date alone begins at midnight UTC."""
    try:
        when = dt.datetime.fromisoformat(text)
        if when.tzinfo is None and len(text) == len("2027-01-31"):
            when = when.replace(tzinfo=dt.UTC)
        if when.tzinfo is not None:
            return when.astimezone(dt.UTC)
    except (ValueError, OverflowError):  # the latter: its zone moves it out of the calendar
        pass  # as a time without zone
    raise RegistryRefused(
        f"{_shown(text)} is not a time: write 2027-01-31T12:00:00Z, or 2027-01-31 for midnight UTC"
    )


def check_record_bytes(size: int) -> int:
    """A bound for the plaintext of TLS records, when it is one."""
    if size not in _RECORD_BYTES:
        raise RegistryRefused(
            f"records of {size} bytes: from {_RECORD_BYTES.start} to {_RECORD_BYTES.stop - 1} are possible"
        )
    return size


def parse_realm_name(text: str) -> str:
    return _parse_name("realm name", text)


def parse_group(text: str) -> str:
    return _parse_name("group", text)


def parse_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels sorted by key, at most 32; keys have letters, digits and `._/-`, values any text without control characters."""
    if len(labels) > _LABELS_MAX:
        raise RegistryRefused(f"a device has at most {_LABELS_MAX} labels, these are {len(labels)}")
    return {key: _parse_label(key, value) for key, value in sorted(labels.items())}


def _parse_label(key: str, value: str) -> str:
    if len(key) > _NAME_CHARACTERS_MAX or _LABEL_KEY.fullmatch(key) is None:
        raise RegistryRefused(
            f"label {_shown(key)}: a label key has 1 to {_NAME_CHARACTERS_MAX} letters, digits or . _ / -"
        )
    _utf8("label", value)
    if len(value) > _LABEL_VALUE_CHARACTERS_MAX or _has_control_characters(value):
        raise RegistryRefused(
            f"label {key}: a value has at most {_LABEL_VALUE_CHARACTERS_MAX} characters, none a control character"
        )
    return value


def parse_networks(texts: Iterable[str]) -> tuple[str, ...]:
    """Networks in CIDR notation (a bare address is a network of one), sorted out and written in one way."""
    networks = tuple(dict.fromkeys(_parse_network(text) for text in texts))
    if len(networks) > _NETWORKS_MAX:
        raise RegistryRefused(f"a device has at most {_NETWORKS_MAX} networks, these are {len(networks)}")
    return networks


def _parse_network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as exc:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise RegistryRefused(
                f"network {_shown(text)} is not an address range: write it like 10.0.0.0/8 or 2001:db8::/32"
            ) from exc
        raise RegistryRefused(
            f"network {_shown(text)} has bits set behind its prefix: is {meant} meant?"
        ) from exc


def _parse_wire_text(what: str, text: str) -> str:
    if not text:
        raise RegistryRefused(f"the {what} is empty")
    size = len(_utf8(what, text))
    if size > IDENTITY_BYTES_MAX:
        raise RegistryRefused(f"the {what} has {size} bytes: at most {IDENTITY_BYTES_MAX} are allowed")
    if _has_control_characters(text):
        raise RegistryRefused(f"the {what} {_shown(text)} has control characters")
    return text


def _parse_name(what: str, text: str) -> str:
    if not text or len(text) > _NAME_CHARACTERS_MAX:
        raise RegistryRefused(f"a {what} has 1 to {_NAME_CHARACTERS_MAX} characters, this one {len(text)}")
    _utf8(what, text)
    if _has_control_characters(text) or text != text.strip():
        raise RegistryRefused(f"the {what} {_shown(text)} has control characters or space around it")
    return text


def _utf8(what: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except (
        UnicodeEncodeError
    ) as exc:  # bytes of another encoding arrive from the command line as lone surrogates
        raise RegistryRefused(f"the {what} is not UTF-8") from exc


def _has_control_characters(text: str) -> bool:
    if text.isprintable():
        return False
    return any(unicodedata.category(character) == "Cc" for character in text)


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= IDENTITY_BYTES_MAX else ascii(text[:IDENTITY_BYTES_MAX]) + "..."
