"""Device keys that are computed from a secret of their realm, so that a factory can make them offline.

    derived-hmac    HMAC-SHA256(secret, identity)                                as Azure DPS derives device keys
    derived-hkdf    HKDF-SHA256 (RFC 5869): IKM the secret, no salt, info the identity, 32 bytes

The identity goes in byte by byte as it is on the wire. Both give 32 bytes, for the hash SHA-256.
"""

import hmac
from typing import Final, Literal

from gateway.errors import RegistryRefused

__all__ = ["KEY_SOURCES", "REALM_SECRET_BYTES_MAX", "REALM_SECRET_BYTES_MIN", "KeySource", "derive_key"]

KeySource = Literal["stored", "derived-hmac", "derived-hkdf"]

KEY_SOURCES: Final[tuple[KeySource, ...]] = ("stored", "derived-hmac", "derived-hkdf")
REALM_SECRET_BYTES_MIN: Final = 32
REALM_SECRET_BYTES_MAX: Final = 64

_NO_SALT: Final = bytes(32)  # RFC 5869, 2.2: a string of zeros as long as the hash


def derive_key(source: str, secret: bytes, identity: bytes) -> bytes:
    """The key of an identity, 32 bytes. Raises RegistryRefused for a source of another version."""
    if source == "derived-hmac":
        return hmac.digest(secret, identity, "sha256")
    if source == "derived-hkdf":
        # One block is all that 32 bytes take (RFC 5869, 2.3)
        return hmac.digest(hmac.digest(_NO_SALT, secret, "sha256"), identity + b"\x01", "sha256")
    raise RegistryRefused(f"keys from the source {source!r} are not known to this version")
