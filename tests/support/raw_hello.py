"""A TLS 1.3 ClientHello by hand, for what no client at hand can say: several identities of devices, each with its key.

RFC 8446: the hello of section 4.1.2, the binders of 4.2.11.2, the key schedule of 7.1.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.support.gateway import Device

__all__ = ["client_hello", "selected_identity"]

SUPPORTED_GROUPS, PRE_SHARED_KEY, SUPPORTED_VERSIONS, PSK_MODES, KEY_SHARE = 10, 41, 43, 45, 51
TLS_AES_128_GCM_SHA256 = b"\x13\x01"
X25519 = b"\x00\x1d"
PSK_DHE_KE = b"\x01"
BINDER_BYTES = 32


def client_hello(devices: Sequence[Device]) -> bytes:
    """A record with a hello that offers these devices' identities in this order, for psk_dhe_ke with SHA-256."""
    share = X25519PrivateKey.generate().public_key().public_bytes_raw()
    identities = b"".join(_sized(device.identity.encode()) + bytes(4) for device in devices)
    binders = bytes((1 + BINDER_BYTES) * len(devices))
    extensions = b"".join((
        _extension(SUPPORTED_VERSIONS, _sized(b"\x03\x04", 1)),
        _extension(SUPPORTED_GROUPS, _sized(X25519)),
        _extension(KEY_SHARE, _sized(X25519 + _sized(share))),
        _extension(PSK_MODES, _sized(PSK_DHE_KE, 1)),
        _extension(PRE_SHARED_KEY, _sized(identities) + _sized(binders)),
    ))  # fmt: skip
    body = b"".join((
        b"\x03\x03", secrets.token_bytes(32), _sized(b"", 1), _sized(TLS_AES_128_GCM_SHA256), _sized(b"\0", 1), _sized(extensions)
    ))  # fmt: skip
    hello = b"\x01" + _sized(body, 3)
    truncated = hello[: -len(_sized(binders))]
    proofs = b"".join(_sized(_binder(bytes.fromhex(device.key), truncated), 1) for device in devices)
    return b"\x16\x03\x01" + _sized(truncated + _sized(proofs))


def selected_identity(server_hello: bytes) -> int | None:
    """Which of the identities a record with a ServerHello names; None: it names none."""
    body = server_hello[5 + 4 :]
    at = 2 + 32 + 1 + body[34] + 3
    end = at + 2 + int.from_bytes(body[at : at + 2])
    at += 2
    while at < end:
        kind, size = int.from_bytes(body[at : at + 2]), int.from_bytes(body[at + 2 : at + 4])
        if kind == PRE_SHARED_KEY:
            return int.from_bytes(body[at + 4 : at + 4 + size])
        at += 4 + size
    return None


def _binder(key: bytes, truncated_hello: bytes) -> bytes:
    """The proof that whoever said this hello has the key."""
    early_secret = hmac.digest(bytes(32), key, "sha256")
    binder_key = _derive(early_secret, b"ext binder", hashlib.sha256().digest())
    return hmac.digest(
        _derive(binder_key, b"finished", b""), hashlib.sha256(truncated_hello).digest(), "sha256"
    )


def _derive(secret: bytes, label: bytes, context: bytes) -> bytes:
    """HKDF-Expand-Label for one block of SHA-256."""
    info = (32).to_bytes(2) + _sized(b"tls13 " + label, 1) + _sized(context, 1)
    return hmac.digest(secret, info + b"\x01", "sha256")


def _sized(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size) + data


def _extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2) + _sized(data)
