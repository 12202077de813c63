"""Profiles: allow-lists of cipher suites by name, in the server's order of preference.

Never an OpenSSL alias: `PSK` alone brings NULL suites. Suites with forward secrecy stand first (RFC 9325 section 4.1),
the CBC suites of RFC 5489 last. Finite-field DHE must not be used any more (RFC 10015, which updates RFC 4279): a
listener that has to take it puts `DHE_PSK_SUITES` behind everything else.
"""

import dataclasses
import enum
from typing import Final

__all__ = ["DHE_PSK_SUITES", "PROFILES", "TLS13_SUITES", "Profile", "ProfileName"]


class ProfileName(enum.StrEnum):
    """What a listener may be set to."""

    MODERN = "modern"
    COMPATIBLE = "compatible"
    CONSTRAINED = "constrained"


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """The TLS 1.2 suites that a listener accepts, by OpenSSL's names. TLS 1.3 is the same for all: `TLS13_SUITES`.

    `has_short_tags`: some of the suites have tags of 64 bits, which OpenSSL gives only at its security level 0.
    """

    name: ProfileName
    tls12_suites: tuple[str, ...]
    has_short_tags: bool = False


TLS13_SUITES: Final = {
    "sha256": ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_CCM_SHA256"),
    "sha384": ("TLS_AES_256_GCM_SHA384",),
}
"""Suites by the hash that a PSK is bound to (RFC 8446 section 4.2.11): a PSK works with suites of its own hash only."""

_MODERN: Final = ("ECDHE-PSK-CHACHA20-POLY1305",)
_AEAD: Final = (
    *_MODERN,
    "PSK-AES128-GCM-SHA256",
    "PSK-AES256-GCM-SHA384",
    "PSK-CHACHA20-POLY1305",
    "PSK-AES128-CCM",
    "PSK-AES256-CCM",
)
_CBC: Final = ("ECDHE-PSK-AES128-CBC-SHA256", "ECDHE-PSK-AES256-CBC-SHA384")
_SHORT_TAGS: Final = ("PSK-AES128-CCM8",)  # RFC 7925 section 4.2 asks devices for this one

DHE_PSK_SUITES: Final = (
    "DHE-PSK-AES128-GCM-SHA256",
    "DHE-PSK-AES256-GCM-SHA384",
    "DHE-PSK-CHACHA20-POLY1305",
    "DHE-PSK-AES128-CCM",
    "DHE-PSK-AES256-CCM",
    "DHE-PSK-AES128-CBC-SHA256",
    "DHE-PSK-AES256-CBC-SHA384",
)
"""For `allow_dhe_psk`, with any profile: taken only when a device offers nothing better."""

PROFILES: Final = {
    ProfileName.MODERN: Profile(ProfileName.MODERN, _MODERN),
    ProfileName.COMPATIBLE: Profile(ProfileName.COMPATIBLE, (*_AEAD, *_CBC)),
    ProfileName.CONSTRAINED: Profile(
        ProfileName.CONSTRAINED, (*_AEAD, *_SHORT_TAGS, *_CBC), has_short_tags=True
    ),
}
