"""Keys on their way into the registry: sealed, fingerprinted, or derived from the secret of their realm."""

from dataclasses import dataclass, field

from gateway.registry.derivation import derive_key
from gateway.registry.sealing import Key, Sealer, credential_context, fingerprint, realm_context

__all__ = ["Vault"]


@dataclass(frozen=True, slots=True)
class Vault:
    """What opens and seals keys while the registry is open."""

    sealer: Sealer
    fingerprint_secret: bytes = field(repr=False)

    def seal_key(self, realm_id: int, identity: str, key: Key) -> bytes:
        return self.sealer.seal(key.reveal(), credential_context(realm_id, identity.encode()))

    def seal_realm_secret(self, realm_id: int, secret: Key) -> bytes:
        return self.sealer.seal(secret.reveal(), realm_context(realm_id))

    def derive(self, realm_id: int, key_source: str, sealed_secret: bytes, identity: str) -> Key:
        """The key of an identity in a realm whose keys are derived."""
        secret = self.sealer.open(sealed_secret, realm_context(realm_id))
        return Key(derive_key(key_source, secret, identity.encode()))

    def fingerprint(self, key: Key) -> bytes:
        return fingerprint(self.fingerprint_secret, key)
