"""Which context serves a ClientHello: one per profile, hint, bound of records, version and PSK hash.

OpenSSL's TLS 1.3 PSK callback runs before its SNI callback, so a context cannot be changed from inside the handshake:
it is chosen from the scanned hello, before the SSL object exists. A context speaks one version, because a hello that
offers TLS 1.3 without `pre_shared_key` beside TLS 1.2 PSK suites would be taken as 1.3 and fail.
"""

import dataclasses
import functools
from collections.abc import Iterable

from gateway.tls.openssl import COMMON_SIGNATURES, ServerContext, TlsVersion
from gateway.tls.profiles import DHE_PSK_SUITES, PROFILES, TLS13_SUITES, Profile, ProfileName

__all__ = ["ContextStore", "RealmContexts"]


@dataclasses.dataclass(frozen=True)
class RealmContexts:
    """The contexts of one realm on one kind of listener, each made at its first use."""

    profile: Profile
    hint: str | None
    alpn: tuple[bytes, ...]
    record_bytes_max: int | None = None
    """Most plaintext bytes that a record of ours holds; None: what TLS allows."""
    allow_dhe_psk: bool = False
    is_watched: bool = False
    """For connections that are traced."""

    def tls12_for(self, signatures: tuple[int, ...]) -> ServerContext:
        """For hellos that can only, or must, be answered in TLS 1.2, and name these signature algorithms."""
        if signatures and COMMON_SIGNATURES.isdisjoint(signatures):
            return self._tls12_for_others
        return self.tls12

    @functools.cached_property
    def tls12(self) -> ServerContext:
        """For nearly all of them."""
        return self._new_tls12()

    @functools.cached_property
    def _tls12_for_others(self) -> ServerContext:
        return self._new_tls12(other_signatures=True)

    def _new_tls12(self, *, other_signatures: bool = False) -> ServerContext:
        return ServerContext(
            TlsVersion.TLS1_2,
            self.tls12_suites,
            hint=self.hint,
            alpn=self.alpn,
            short_tags=self.profile.has_short_tags,
            dhe=self.allow_dhe_psk,
            record_bytes_max=self.record_bytes_max,
            is_watched=self.is_watched,
            other_signatures=other_signatures,
        )

    @property
    def tls12_suites(self) -> tuple[str, ...]:
        """The suites of TLS 1.2, by OpenSSL's names."""
        return self.profile.tls12_suites + (DHE_PSK_SUITES if self.allow_dhe_psk else ())

    @functools.cached_property
    def _tls13(self) -> dict[str, ServerContext]:
        return {}

    @property
    def suites(self) -> list[str]:
        """All suites allowed, by OpenSSL's names, for the log."""
        return [*TLS13_SUITES["sha256"], *TLS13_SUITES["sha384"], *self.tls12_suites]

    def tls13(self, hash_name: str) -> ServerContext:
        """For a TLS 1.3 hello whose chosen PSK is bound to `hash_name`, `sha256` or `sha384`."""
        context = self._tls13.get(hash_name)
        if context is None:
            context = ServerContext(
                TlsVersion.TLS1_3,
                TLS13_SUITES[hash_name],
                alpn=self.alpn,
                record_bytes_max=self.record_bytes_max,
                is_watched=self.is_watched,
            )
            self._tls13[hash_name] = context
        return context


_Key = tuple[ProfileName, str | None, tuple[bytes, ...], int | None, bool, bool]


class ContextStore:
    """All contexts of a worker. Realms that differ in nothing here share theirs; a changed realm asks for other ones."""

    def __init__(self) -> None:
        self._contexts: dict[_Key, RealmContexts] = {}

    def contexts(
        self,
        profile: ProfileName,
        hint: str | None,
        alpn: tuple[bytes, ...],
        record_bytes_max: int | None = None,
        allow_dhe_psk: bool = False,
        *,
        is_watched: bool = False,
    ) -> RealmContexts:
        """The contexts for this profile, hint, ALPN list (best first), bound of records and DHE; traced or not."""
        key = (profile, hint or None, alpn, record_bytes_max, allow_dhe_psk, is_watched)
        found = self._contexts.get(key)
        if found is None:
            found = self._contexts[key] = RealmContexts(
                PROFILES[profile], hint or None, alpn, record_bytes_max, allow_dhe_psk, is_watched
            )
        return found

    def keep(self, realms: Iterable[tuple[str | None, int | None]]) -> None:
        """Forget the contexts for hints and bounds of records that no realm has any more."""
        kept = {(hint or None, record_bytes_max) for hint, record_bytes_max in realms}
        self._contexts = {key: value for key, value in self._contexts.items() if (key[1], key[3]) in kept}
