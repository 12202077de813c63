"""EMQX' psk_authentication.init_file: `PSKIdentity:SharedSecret`; the key is the text behind the colon, byte by byte."""

from gateway.registry.formats.colon import ColonLines

__all__ = ["Emqx"]


class Emqx(ColonLines):
    """Only a key that is printable text can be written: EMQX would take the digits of a hex key for the key."""

    name = "emqx"
    key_encoding = "text"
