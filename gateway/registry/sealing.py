"""Keys at rest: sealed with AES-256-GCM under a master key that is not in the database.

A sealed value is

    0x01 | key id, 4 bytes | nonce, 12 bytes | ciphertext | tag, 16 bytes

and is bound to its place by a context (the authenticated data of GCM): realm and identity for a credential, the name
for a secret of the registry. A value moved to another row does not open. The key id names the master key, so that
several can be in use while keys move from one to the next. Nonces are random: with one master key, 2**32 values may be
sealed (NIST SP 800-38D, 8.3), thousands of times the largest fleet.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from gateway.errors import ConfigurationError, RegistryMismatch
from gateway.files import sync_folder

__all__ = [
    "MASTER_KEY_TEXT_BYTES_MAX",
    "Key",
    "MasterKey",
    "Sealer",
    "credential_context",
    "fingerprint",
    "read_key_file",
    "realm_context",
    "secret_context",
]

_VERSION = b"\x01"
_KEY_ID_END = 5
_NONCE_END = 17
_SEALED_BYTES_MIN = _NONCE_END + 16
_MASTER_KEY_BYTES = 32
_MASTER_KEY_LINE = re.compile(rb"[0-9A-Fa-f]{64}")
_MASTER_KEYS_MAX = 16
MASTER_KEY_TEXT_BYTES_MAX = 4096
_GENERATED_KEY_BYTES = 32  # RFC 9813: at least 32 for use over the Internet
_FINGERPRINT_BYTES = 16


class Key:
    """A pre-shared key. Printing, logging or formatting it shows its length only; `reveal` and `hex` are on purpose."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    @classmethod
    def generate(cls) -> Self:
        """A new random key of 32 bytes."""
        return cls(secrets.token_bytes(_GENERATED_KEY_BYTES))

    def reveal(self) -> bytes:
        return self._raw

    def hex(self) -> str:
        return self._raw.hex()

    def __len__(self) -> int:
        return len(self._raw)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"Key(<{len(self._raw)} bytes>)"

    def __reduce__(self) -> str:
        raise TypeError("a key is not pickled")


class MasterKey:
    """The 32 bytes under which everything is sealed; kept in a file of 64 hex digits that its owner alone may read."""

    __slots__ = ("_raw", "id")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != _MASTER_KEY_BYTES:
            raise ConfigurationError(f"a master key has {_MASTER_KEY_BYTES} bytes, this one {len(raw)}")
        self._raw = raw
        self.id = hmac.digest(raw, b"psk-gateway master key id", "sha256")[:4]

    @classmethod
    def generate(cls) -> Self:
        return cls(secrets.token_bytes(_MASTER_KEY_BYTES))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The first key in the file `path`.

        Raises:
            ConfigurationError: it is missing, unreadable, open to others, or does not hold 64 hex digits.

        """
        name = f"master key file {path}"
        return cls.parse_all(read_key_file(path, name), name)[0]

    @classmethod
    def parse_all(cls, text: bytes, where: str) -> list[Self]:
        """The keys in `text`, one a line: the first seals, all of them open. `where` names the place in errors.

        Raises:
            ConfigurationError: it does not hold lines of 64 hex digits and nothing else, or too many.

        """
        lines = text.split()
        if not lines or any(_MASTER_KEY_LINE.fullmatch(line) is None for line in lines):
            raise ConfigurationError(
                f"{where} must hold 64 hex digits and nothing else (one line for each key)"
            )
        if len(lines) > _MASTER_KEYS_MAX:
            raise ConfigurationError(
                f"{where} holds {len(lines)} master keys: at most {_MASTER_KEYS_MAX} are allowed"
            )
        return [cls(bytes.fromhex(line.decode("ascii"))) for line in lines]

    def write(self, path: Path) -> None:
        """Write a new file `path`, mode 0600.

        Raises:
            ConfigurationError: it is there already, or cannot be written.

        """
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(self._raw.hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
            sync_folder(path.parent)
        except FileExistsError as exc:
            raise ConfigurationError(
                f"master key file {path} is there already: it is never overwritten"
            ) from exc
        except OSError as exc:
            raise ConfigurationError(f"master key file {path} cannot be written: {exc.strerror}") from exc

    def cipher(self) -> AESGCM:
        return AESGCM(self._raw)

    def __repr__(self) -> str:
        return f"MasterKey(id={self.id.hex()})"

    def __reduce__(self) -> str:
        raise TypeError("a master key is not pickled")


def read_key_file(path: Path, name: str, *, private: bool = True) -> bytes:
    """What a file with master keys holds; `name` stands for it in errors.

    Raises:
        ConfigurationError: it is missing, unreadable, or open to others and `private`.

    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(MASTER_KEY_TEXT_BYTES_MAX)
    except FileNotFoundError as exc:
        raise ConfigurationError(
            f"{name} does not exist: restore it (`gatewayctl init` makes one for a new registry)"
        ) from exc
    except OSError as exc:
        raise ConfigurationError(f"{name} cannot be read: {exc.strerror}") from exc
    if private and mode & 0o077:
        raise ConfigurationError(f"{name} is open to others (mode {mode:04o}): run `chmod 600 {path}`")
    return text


class Sealer:
    """Seals under the first master key and opens under any of them."""

    def __init__(self, master_keys: Sequence[MasterKey]) -> None:
        self.replace(master_keys)

    def replace(self, master_keys: Sequence[MasterKey]) -> None:
        """Seal under the first of these and open under any of them, from now on."""
        if not master_keys:
            raise ConfigurationError("a master key is needed")
        self.master_key_id = master_keys[0].id
        self._prefix = _VERSION + master_keys[0].id
        self._ciphers = {_VERSION + key.id: key.cipher() for key in reversed(master_keys)}

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """`plain`, readable only with the master key and for the same `context`."""
        nonce = os.urandom(_NONCE_END - _KEY_ID_END)
        return self._prefix + nonce + self._ciphers[self._prefix].encrypt(nonce, plain, context)

    @property
    def prefix(self) -> bytes:
        """How every value begins that is sealed under the first master key."""
        return self._prefix

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed. On the path of every handshake.

        Raises:
            RegistryMismatch: sealed under another master key or for another context, or damaged.

        """
        cipher = self._ciphers.get(sealed[:_KEY_ID_END])
        if cipher is None or len(sealed) < _SEALED_BYTES_MIN:
            raise RegistryMismatch(_why_unknown(sealed))
        try:
            return cipher.decrypt(sealed[_KEY_ID_END:_NONCE_END], sealed[_NONCE_END:], context)
        except InvalidTag as exc:
            raise RegistryMismatch(
                "a sealed key does not open: it was changed, or moved from another row"
            ) from exc


def _why_unknown(sealed: bytes) -> str:
    if len(sealed) < _SEALED_BYTES_MIN or sealed[:1] != _VERSION:
        return "a sealed key is damaged: it is not in a form that this program knows"
    return f"a key is sealed under master key {sealed[1:_KEY_ID_END].hex()}, which is not configured"


def credential_context(realm_id: int, identity: bytes) -> bytes:
    """Binds a sealed key to its realm and identity."""
    return b"credential\x00" + realm_id.to_bytes(8, "big") + identity


def secret_context(name: str) -> bytes:
    """Binds a sealed secret of the registry to its name."""
    return b"secret\x00" + name.encode()


def realm_context(realm_id: int) -> bytes:
    """Binds the sealed secret of a realm, which its keys are derived from, to the realm."""
    return b"realm\x00" + realm_id.to_bytes(8, "big")


def fingerprint(secret: bytes, key: Key) -> bytes:
    """16 bytes by which the same key used twice is found, and which tell nothing without `secret`."""
    return hmac.digest(secret, key.reveal(), hashlib.sha256)[:_FINGERPRINT_BYTES]
