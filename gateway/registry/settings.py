"""The table [registry] of gateway.toml."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_serializer,
    model_validator,
)
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from gateway.registry.masterkeys import MasterKeySource, read_credential, run_command

__all__ = ["RegistrySettings", "masked_url"]

_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql+pymysql": "mysql+pymysql",
    "mariadb+pymysql": "mariadb+pymysql",
}


def _base(info: ValidationInfo) -> Path:
    """The folder that relative paths are relative to: where gateway.toml is."""
    context = info.context if isinstance(info.context, dict) else {}
    return Path(context.get("base", "."))


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    return (_base(info) / path).absolute()


def _parse_url(text: str, info: ValidationInfo) -> str:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # their texts may quote the password
        raise ValueError(
            "is not a database URL: write sqlite:///registry.db or postgresql+psycopg://user@host/database"
        ) from None
    driver = _DRIVERS.get(url.drivername)
    if driver is None:
        raise ValueError(
            f"has the driver {url.drivername}: use sqlite, postgresql+psycopg or mysql+pymysql",
        )
    url = url.set(drivername=driver)
    if driver == "sqlite":
        url = _resolve_sqlite(url, info)
    elif not url.database:
        raise ValueError(
            "names no database: write its name after the host, as in postgresql+psycopg://user@host/database"
        )
    return url.render_as_string(hide_password=False)


def _resolve_sqlite(url: URL, info: ValidationInfo) -> URL:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ValueError("needs a file, as in sqlite:///registry.db: several processes share the registry")
    return url.set(database=str(_resolve_path(Path(url.database), info)))


def masked_url(url: str) -> str:
    """`url` as it may be shown: with *** in place of its password."""
    return make_url(url).render_as_string(hide_password=True)


class RegistrySettings(BaseModel):
    """Where the registry is, and how its sealed keys are opened."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    url: Annotated[
        str,
        AfterValidator(_parse_url),
        Field(
            repr=False,
            description="The database: `sqlite:///FILE`, `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE` or, for MariaDB, "
            "`mysql+pymysql://USER:PASSWORD@HOST/DATABASE`.",
        ),
    ] = "sqlite:///registry.db"
    master_key_file: Annotated[
        Path,
        AfterValidator(_resolve_path),
        Field(
            description="File of mode 0600 with the master keys, 64 hex digits a line: the first seals device keys, all of them "
            "open."
        ),
    ] = Path("master.key")
    master_key: Annotated[
        str | None,
        Field(
            repr=False,
            description="Master keys themselves, meant for the environment; in place of the file, like the two below.",
        ),
    ] = None
    master_key_credential: Annotated[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,255}$")] | None,
        Field(description="Name of a systemd credential (`LoadCredential=`) with master keys."),
    ] = None
    master_key_command: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)] | None,
        Field(
            description="Program and arguments: it prints master keys, is started without a shell and has 30 s."
        ),
    ] = None
    poll_interval_s: float = Field(
        default=0.5,
        ge=0.05,
        le=60,
        allow_inf_nan=False,
        description="Seconds between looks for changes. A change is felt within them, and promised within a second; with "
        "PostgreSQL, which tells of changes, at once.",
    )
    max_staleness_s: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="How old the replica may be, in seconds, for a new device to be let in; live sessions stay. 0: any age.",
    )

    @model_validator(mode="after")
    def _check_master_key(self) -> Self:
        given = [
            name
            for name in ("master_key", "master_key_credential", "master_key_command")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: keep one of them")
        return self

    def master_keys(self) -> MasterKeySource:
        """Where the master keys are; a command is run for it.

        Raises:
            ConfigurationError: the credential is not there, or the command failed.

        """
        if self.master_key is not None:
            return MasterKeySource(name="registry.master_key", text=self.master_key)
        if self.master_key_credential is not None:
            return read_credential(self.master_key_credential)
        if self.master_key_command is not None:
            return run_command(self.master_key_command)
        return MasterKeySource(name=f"master key file {self.master_key_file}", path=self.master_key_file)

    @field_serializer("master_key", when_used="json-unless-none")
    def _mask_master_key(self, _key: str) -> str:
        return "***"

    @field_serializer("url", when_used="json")
    def _mask_url(self, url: str) -> str:
        return masked_url(url)
