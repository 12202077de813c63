"""stunnel's PSKsecrets: `identity:key`, no comments; a key is text, or hex when it looks like hex. Written as hex."""

from gateway.registry.formats.colon import ColonLines

__all__ = ["Stunnel"]


class Stunnel(ColonLines):
    """Keys below 16 bytes are refused by stunnel as they are here."""

    name = "stunnel"
    key_encoding = "hex-or-text"
    has_comments = False
