"""GnuTLS' password file, as psktool writes it: `user:hexkey`; a user that begins with # is hex itself."""

import binascii

from gateway.errors import RegistryRefused
from gateway.registry.formats.colon import ColonLines

__all__ = ["GnuTls"]


class GnuTls(ColonLines):
    """Takes every identity: one that would be misread is written in hex."""

    name = "gnutls"
    key_encoding = "hex"
    has_comments = False

    def decode_identity(self, text: str) -> str:
        if not text.startswith("#"):
            return text
        try:
            return binascii.unhexlify(text[1:]).decode()
        except (binascii.Error, ValueError) as exc:  # ValueError: not ASCII before, or not UTF-8 after
            raise RegistryRefused("an identity that begins with # is hex digits of UTF-8") from exc

    def encode_identity(self, identity: str) -> str:
        is_plain = ":" not in identity and not identity.startswith("#")
        return identity if is_plain else f"#{identity.encode().hex()}"

    def unfit(self, identity: str) -> str | None:
        del identity
        return None
