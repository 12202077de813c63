"""Mosquitto's psk_file: `identity:key`, the key in hex; it takes white space around both away."""

from gateway.registry.formats.colon import ColonLines

__all__ = ["Mosquitto"]


class Mosquitto(ColonLines):
    """Identities with white space at an end cannot be written."""

    name = "mosquitto"
    key_encoding = "hex"

    def decode_identity(self, text: str) -> str:
        return text.strip()

    def unfit(self, identity: str) -> str | None:
        if identity != identity.strip():
            return "an identity with white space at its end"
        return super().unfit(identity)
