"""init and migrate: from nothing to a registry that can be used."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.options import ConfigOption, load_settings
from gateway.errors import ConfigurationError

__all__ = ["app"]

app = typer.Typer()

CONFIGURATION = """\
# Configuration of a PSK gateway. `gatewayctl check-config` checks it and shows what is in force.

[node]
workers = 1                     # 0 = one per core
data_dir = "data"

[registry]
url = "sqlite:///registry.db"
master_key_file = "master.key"  # back it up apart from the registry: without it no device key can be read

[admin]
bind = "127.0.0.1:9464"         # /metrics /healthz /readyz

[[listeners]]
name = "tls"
bind = "127.0.0.1:8883"         # 0.0.0.0:8883 lets devices on the network in
realm = "default"
profile = "compatible"

[[routes]]                      # the first that matches a session is taken
name = "messages"
framing = "lines"               # each line is a message
ack = true                      # "ok N" to the device once message N is on the disk
content_type = "text/plain"
backend = "events"

[backends.events]
kind = "file"
path = "events.jsonl"           # "-" is stdout
"""

SQLITE_SIDE_FILES = ("-wal", "-shm", "-journal")


@app.command(rich_help_panel="Set up")
def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; made if it is not there.")
    ],
) -> None:
    """Write a configuration, a master key and an empty registry with the realm `default`; never overwrite."""
    from gateway.registry.founding import initialise
    from gateway.registry.ledger import Author
    from gateway.registry.migrate import migrate as migrate_registry
    from gateway.registry.sealing import MasterKey
    from gateway.registry.settings import RegistrySettings

    names = ("master.key", "registry.db", "gateway.toml")
    with _all_or_nothing(directory, names):
        MasterKey.generate().write(directory / "master.key")
        settings = RegistrySettings.model_validate({}, context={"base": directory})
        migrate_registry(settings.url)
        initialise(settings, Author.of_process())
        configuration = directory / "gateway.toml"
        configuration.touch(mode=0o600, exist_ok=False)  # a database password may be written into it later
        configuration.write_text(CONFIGURATION, "utf-8")
    print(f"Wrote gateway.toml, master.key and registry.db to {directory}, with the realm `default`. Next:")
    option = f"--config {shlex.quote(str(configuration))}"
    print(f"  gatewayctl add-device IDENTITY {option}")
    print(f"  gatewayctl run {option}")


@contextlib.contextmanager
def _all_or_nothing(directory: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Refuse when one of the files is there; remove what was written when the block fails."""
    for name in names:
        if (directory / name).exists() or (directory / name).is_symlink():
            raise ConfigurationError(
                f"{directory / name} is there already: nothing was changed, choose another folder or move it away"
            )
    made = not directory.exists()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"folder {directory} cannot be made: {exc.strerror}") from exc
    try:
        yield
    except BaseException:
        for name in names:
            for side in ("", *SQLITE_SIDE_FILES):
                (directory / (name + side)).unlink(missing_ok=True)
        if made:
            directory.rmdir()
        raise


@app.command(rich_help_panel="Set up")
def migrate(config: ConfigOption = None) -> None:
    """Bring the registry to the newest schema; a new database becomes a registry with the realm `default`."""
    settings = load_settings(config).registry

    from gateway.registry.founding import initialise
    from gateway.registry.ledger import Author
    from gateway.registry.migrate import migrate as migrate_registry

    revision = migrate_registry(settings.url)
    founded = initialise(settings, Author.of_process())
    print(f"The registry has schema {revision}" + (" and the realm `default`." if founded else "."))
