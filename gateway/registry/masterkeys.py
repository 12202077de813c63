"""Where master keys come from: a file, the environment, a systemd credential, or what a command prints.

Every source gives a text with one key a line. The first seals, all of them open: a new key is put before the old one,
`gatewayctl reseal-keys` moves everything to it, and then the old line is taken out. A source that is a file is looked at
again by running gateways, so none of this needs a restart; a text from the environment or a command is read once.
"""

import os
import subprocess
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from gateway.errors import ConfigurationError
from gateway.registry.sealing import MASTER_KEY_TEXT_BYTES_MAX, MasterKey, Sealer, read_key_file

__all__ = ["KeyRing", "MasterKeySource", "read_credential", "run_command"]

_COMMAND_TIMEOUT_S: Final = 30


class MasterKeySource(BaseModel):
    """One place with master keys. Made to be sent to the processes of a gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As it stands in messages, such as `master key file /etc/psk-gateway/master.key`."""
    path: Path | None = None
    is_private: bool = True
    """Whether the file must be its owner's alone; systemd sees to that itself."""
    text: str = Field(default="", repr=False)
    """What a source that is no file gave."""

    @property
    def place(self) -> str:
        """Where the keys are, in short."""
        return self.name if self.path is None else str(self.path)

    def load(self) -> list[MasterKey]:
        """The keys, the one that seals first.

        Raises:
            ConfigurationError: the file is missing, unreadable or open to others, or what it holds are no keys.

        """
        text = (
            self.text.encode()
            if self.path is None
            else read_key_file(self.path, self.name, private=self.is_private)
        )
        return MasterKey.parse_all(text, self.name)

    def sealer(self) -> Sealer:
        return Sealer(self.load())


def read_credential(name: str) -> MasterKeySource:
    """The credential of this name that systemd gave to the service (LoadCredential=).

    Raises:
        ConfigurationError: this process got no credentials.

    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigurationError(
            f"registry.master_key_credential: $CREDENTIALS_DIRECTORY is not set, so there is no credential {name}: "
            f"start this by systemd with LoadCredential={name}:FILE"
        )
    return MasterKeySource(name=f"credential {name}", path=Path(folder) / name, is_private=False)


def run_command(command: tuple[str, ...]) -> MasterKeySource:
    """What a command prints; it is started without a shell, and its output is never shown.

    Raises:
        ConfigurationError: it cannot be started, fails, or takes longer than 30 s.

    """
    name = "the output of registry.master_key_command"
    try:
        done = subprocess.run(  # noqa: S603 - the command is the operator's own setting
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
            # Settings of ours may hold secrets, which are none of its business.
            env={name: value for name, value in os.environ.items() if not name.startswith("PSKGW_")},
        )
    except OSError as exc:
        raise ConfigurationError(
            f"registry.master_key_command: {command[0]} cannot be started: {exc.strerror}"
        ) from exc
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"registry.master_key_command: {command[0]} did not end within {_COMMAND_TIMEOUT_S} s"
        ) from None
    if done.returncode:
        raise ConfigurationError(
            f"registry.master_key_command: {command[0]} ended with status {done.returncode}: "
            "run it by hand to see why"
        )
    if len(done.stdout) > MASTER_KEY_TEXT_BYTES_MAX:
        raise ConfigurationError(f"{name} has more than {MASTER_KEY_TEXT_BYTES_MAX} bytes")
    return MasterKeySource(name=name, text=done.stdout.decode("ascii", "replace"))


class KeyRing:
    """A sealer that follows its source while a process runs."""

    def __init__(self, source: MasterKeySource) -> None:
        self._source = source
        self._seen = self._look()
        self.sealer = source.sealer()

    def refresh(self) -> bool:
        """Read the source again when it is a file that changed; whether there are other keys now.

        Raises:
            ConfigurationError: it holds no keys now; the ones before stay in use, and this is not said twice.

        """
        seen = self._look()
        if seen == self._seen:
            return False
        self._seen = seen
        self.sealer.replace(self._source.load())
        return True

    def _look(self) -> tuple[int, ...]:
        if self._source.path is None:
            return ()
        try:
            status = self._source.path.stat()
        except OSError:
            return ()
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
