"""Which identity and key a device uses: its key ring, from hint to key.

RFC 4279 section 5.2: without an agreement about it, a client must ignore the identity hint of the server. So a ring with
one key that names no hint takes any. A ring that names hints is such an agreement: a hint it does not have is refused,
because a key meant for one gateway is never tried on another.

TLS 1.3 has no hint (RFC 8446 section 4.2.11: identities stand in the ClientHello, before the server has said anything):
there the ring offers its default key. In TLS 1.2 the default key is also the one for a server that sends no hint.
"""

import dataclasses
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self

from gateway.errors import ConfigurationError, DeviceRefused, RegistryRefused
from gateway.registry.identities import check_key, parse_hint, parse_identity, parse_key_hex
from gateway.registry.sealing import Key

__all__ = ["DeviceKey", "KeyRing", "check_private", "read_key_file"]

_FILE_BYTES_MAX: Final = 64 * 1024
_FIELDS: Final = frozenset({"hint", "identity", "key", "key_file", "hash", "default"})
HASHES: Final = ("sha256", "sha384")


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceKey:
    """One credential. `hint`: the only hint it is for, None for any. `hash_name`: what TLS 1.3 binds the key to."""

    identity: str
    key: Key
    hint: str | None = None
    hash_name: str = "sha256"


class KeyRing:
    """The keys of a device. Not empty; each hint stands once."""

    def __init__(self, keys: Iterable[DeviceKey], default: DeviceKey | None = None) -> None:
        """`default` is one of `keys`; without it the one without a hint, else the first.

        Raises ConfigurationError for a ring that is empty or ambiguous, RegistryRefused for an identity, hint or key
        that no gateway takes.
        """
        self.keys = tuple(keys)
        if not self.keys:
            raise ConfigurationError("the key ring is empty: give it an identity and its key")
        by_hint: dict[str | None, DeviceKey] = {}
        for key in self.keys:
            parse_identity(key.identity)
            check_key(key.key)
            if key.hash_name not in HASHES:
                raise ConfigurationError(f"{key.hash_name!r} is not a hash of TLS 1.3 PSKs: sha256 or sha384")
            if key.hint is not None:
                parse_hint(key.hint)
            if by_hint.setdefault(key.hint, key) is not key:
                which = "without a hint" if key.hint is None else f"for hint {key.hint!r}"
                raise ConfigurationError(f"the key ring has two keys {which}: keep one")
        self._by_hint = by_hint
        self.default = default if default is not None else by_hint.get(None, self.keys[0])

    @classmethod
    def of(cls, identity: str, key: Key, *, hint: str | None = None, hash_name: str = "sha256") -> Self:
        """The ring of one key, for any hint, or only for the one given."""
        return cls([DeviceKey(identity, key, hint, hash_name)])

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """A TOML file of `[[keys]]`, each with `identity`, `key` (hex) or `key_file`, and perhaps `hint`, `hash`, `default`.

        Relative key files are relative to the ring. Raises ConfigurationError, also when others may read a file.
        """
        try:
            document = tomllib.loads(_read_private(path, "key ring"))
        except tomllib.TOMLDecodeError as exc:
            raise ConfigurationError(f"key ring {path} is not TOML: {exc}") from exc
        tables = document.pop("keys", None)
        if document or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ConfigurationError(
                f"key ring {path}: write [[keys]] tables with hint, identity and key, and no more"
            )
        try:
            keys = [_parse_key(table, path.parent) for table in tables]
            return cls(keys, _default_of(keys, tables))
        except (RegistryRefused, ConfigurationError) as exc:
            raise ConfigurationError(f"key ring {path}: {exc}") from exc

    def key_for(self, hint: str | None) -> DeviceKey:
        """The key for a server's hint, or for none. Raises DeviceRefused for a hint that the ring does not have."""
        if hint is None:
            return self.default
        found = self._by_hint.get(hint) or self._by_hint.get(None)
        if found is None:
            known = ", ".join(repr(key.hint) for key in self.keys)
            raise DeviceRefused(
                f"the gateway's hint is {hint!r}, and there are keys for {known} only: "
                "is it the right gateway? If it is, give a key for its hint"
            )
        return found

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(f'{key.hint!r}: {key.identity!r}' for key in self.keys)})"


def read_key_file(path: Path) -> Key:
    """The key in a file of hex digits. Raises ConfigurationError, also when others than the owner may read it."""
    try:
        return parse_key_hex(_read_private(path, "key file"))
    except RegistryRefused as exc:
        raise ConfigurationError(f"key file {path}: {exc}") from exc


def check_private(path: Path, what: str) -> None:
    """Raise ConfigurationError for a file that others may read; a pipe or a terminal is nobody else's anyway."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077 and path.is_file():
        raise ConfigurationError(
            f"{what} {path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`, "
            "and think about a new key"
        )


def _read_private(path: Path, what: str) -> str:
    """A short file that only its owner may read."""
    try:
        with path.open("rb") as file:
            check_private(path, what)
            raw = file.read(_FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigurationError(f"{what} {path} cannot be read: {exc.strerror}") from exc
    if len(raw) > _FILE_BYTES_MAX:
        raise ConfigurationError(f"{what} {path} has more than {_FILE_BYTES_MAX} bytes: is it the right one?")
    return raw.decode("utf-8", "replace")


def _default_of(keys: list[DeviceKey], tables: list[dict[str, Any]]) -> DeviceKey | None:
    defaults = [key for key, table in zip(keys, tables, strict=True) if table.get("default", False)]
    if len(defaults) > 1:
        raise ConfigurationError("two keys say `default = true`: keep one")
    return defaults[0] if defaults else None


def _parse_key(table: dict[str, Any], folder: Path) -> DeviceKey:
    unknown = sorted(table.keys() - _FIELDS)
    if unknown:
        raise ConfigurationError(f"unknown key {unknown[0]!r}: a table has {', '.join(sorted(_FIELDS))}")
    for name in _FIELDS - {"default"}:
        if not isinstance(table.get(name, ""), str):
            raise ConfigurationError(f"{name} must be a text")
    if "identity" not in table:
        raise ConfigurationError("a table has no identity")
    if ("key" in table) == ("key_file" in table):
        raise ConfigurationError(f"{table['identity']}: give either key (hex) or key_file")
    key = parse_key_hex(table["key"]) if "key" in table else read_key_file(folder / table["key_file"])
    return DeviceKey(table["identity"], key, table.get("hint"), table.get("hash", "sha256"))
