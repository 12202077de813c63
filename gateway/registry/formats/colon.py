"""Lines of `identity:key`, as several products have them; each says for itself what it does otherwise."""

from collections.abc import Iterator
from typing import ClassVar

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.formats.base import FileCredential, FileDevice, Format, Parsed, or_bad_line
from gateway.registry.formats.keys import KeyEncoding, decode_key, encode_key
from gateway.registry.formats.source import BadLine, DeviceFile, Line

__all__ = ["ColonLines"]


class ColonLines(Format):
    """One credential a line, split at the first colon."""

    needs_keys = True
    has_comments: ClassVar[bool] = True
    """Whether a line that begins with # is none."""

    def read(self, file: DeviceFile, encoding: KeyEncoding) -> Iterator[Parsed]:
        for line in file.lines():
            if isinstance(line, BadLine):
                yield line
            elif not (self.has_comments and line.text.startswith("#")):
                yield self._device(line, encoding)

    def _device(self, line: Line, encoding: KeyEncoding) -> FileDevice | BadLine:
        def parse() -> FileDevice:
            left, colon, right = line.text.partition(":")
            if not colon:
                raise RegistryRefused("the line is not identity:key")
            identity = identities.parse_identity(self.decode_identity(left))
            credential = FileCredential(identity, decode_key(right, encoding))
            return FileDevice(line.number, line.number, (credential,))

        return or_bad_line(line.number, parse)

    def write(self, device: FileDevice, encoding: KeyEncoding, *, with_keys: bool) -> str:
        assert with_keys
        lines = []
        for credential in device.credentials:
            assert credential.key is not None
            lines.append(
                f"{self.encode_identity(credential.identity)}:{encode_key(credential.key, encoding)}\n"
            )
        return "".join(lines)

    def decode_identity(self, text: str) -> str:
        """The identity that stands before the colon. Raises RegistryRefused."""
        return text

    def encode_identity(self, identity: str) -> str:
        """The other way round."""
        return identity

    def unfit(self, identity: str) -> str | None:
        if ":" in identity:
            return "a colon in the identity"
        if self.has_comments and identity.startswith("#"):
            return "an identity that begins with #"
        return None
