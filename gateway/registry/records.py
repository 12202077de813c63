"""What a handshake needs to know, as it stands in the replica.

The structs are encoded as arrays: a later version may add fields at the end, with defaults, and still read records
written before. Anything else is a new `replica.FORMAT`.
"""

from typing import Literal

import msgspec

__all__ = ["CommandRecord", "CredentialRecord", "PskHash", "RealmRecord", "identity_key"]

PskHash = Literal["sha256", "sha384"]


class RealmRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tenant: identities are unique within it, and `hint` is what TLS 1.2 clients are shown (None: no hint)."""

    id: int
    name: str
    hint: str | None
    record_bytes_max: int | None = None
    """Most plaintext bytes of a record to its devices; None: what TLS allows."""
    key_source: str = "stored"
    """See `derivation`; a source of a later version opens no key."""
    sealed_secret: bytes = b""
    """What the keys of the realm are derived from; empty when each is stored."""
    enrolls: bool = False
    """An unknown identity that proves its derived key is added as a device."""
    idle_days: int | None = None
    sessions_per_device: int | None = None
    """None: as the limits of the node have it; 0: any number."""
    service_day: int = 0
    """How many days the registry was served, the same in every realm: see `usage`."""


class CredentialRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One identity with its sealed key, and what its device may do.

    Times are Unix seconds, `networks` are CIDR texts (none: any address). The key opens with
    `sealing.credential_context(realm_id, identity)` only.
    """

    credential_id: int
    device_id: int
    realm_id: int
    device: str
    group: str | None
    labels: dict[str, str]
    disabled: bool
    revoked: bool
    not_before: float | None
    not_after: float | None
    networks: tuple[str, ...]
    hash: PskHash
    sealed_key: bytes
    """Empty: the key is derived from the realm's secret, or (with `revoked`) this is the tombstone of a removed device."""
    used_on: int = 0
    """The day of service on which it was last used, see `usage`."""

    @property
    def enabled(self) -> bool:
        """Neither is the device disabled nor the credential revoked; its window may still be closed."""
        return not (self.disabled or self.revoked)


class CommandRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A command that waits for its device. `number` orders them, `expires_at` is Unix seconds."""

    device_id: int
    number: int
    command_id: str
    payload: bytes
    expires_at: float


def identity_key(realm_id: int, identity: bytes) -> bytes:
    """The name of a credential in replica and overlay: eight bytes of realm, then the identity as it is on the wire."""
    return realm_id.to_bytes(8, "big") + identity
