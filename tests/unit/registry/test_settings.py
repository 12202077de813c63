from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.registry.settings import RegistrySettings, masked_url


def parse(values: dict[str, Any], base: str = "/etc/psk-gateway") -> RegistrySettings:
    return RegistrySettings.model_validate(values, context={"base": Path(base)})


def test_defaults_are_beside_the_configuration() -> None:
    settings = parse({})
    assert settings.url == "sqlite:////etc/psk-gateway/registry.db"
    assert settings.master_key_file == Path("/etc/psk-gateway/master.key")
    assert settings.poll_interval_s == 0.5


def test_relative_paths_are_relative_to_the_configuration() -> None:
    settings = parse({"url": "sqlite:///data/r.db", "master_key_file": "keys/master.key"})
    assert settings.url == "sqlite:////etc/psk-gateway/data/r.db"
    assert settings.master_key_file == Path("/etc/psk-gateway/keys/master.key")


def test_absolute_paths_stay() -> None:
    settings = parse({"url": "sqlite:////srv/r.db", "master_key_file": "/srv/master.key"})
    assert (settings.url, settings.master_key_file) == ("sqlite:////srv/r.db", Path("/srv/master.key"))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        (
            "postgresql+psycopg://u:p%40ss@h:5433/d?sslmode=require",
            "postgresql+psycopg://u:p%40ss@h:5433/d?sslmode=require",
        ),
        ("mysql+pymysql://u@h/d", "mysql+pymysql://u@h/d"),
    ],
)
def test_servers(given: str, meant: str) -> None:
    assert parse({"url": given}).url == meant


def test_the_password_is_not_shown() -> None:
    settings = parse({"url": "postgresql://someone:hunter2@h/d"})
    assert "hunter2" in settings.url
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)
    assert "hunter2" not in settings.model_dump_json()
    assert masked_url(settings.url) == "postgresql+psycopg://someone:***@h/d"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "registry.db"}, "is not a database URL"),
        ({"url": "postgresql://u:hunter2@h:port/d"}, "is not a database URL"),
        ({"url": "oracle://u:hunter2@h/d"}, "has the driver oracle"),
        ({"url": "postgresql+asyncpg://u:hunter2@h/d"}, "has the driver postgresql"),
        ({"url": "postgresql://u:hunter2@h"}, "names no database"),
        ({"url": "sqlite://"}, "needs a file"),
        ({"url": "sqlite:///:memory:"}, "needs a file"),
        ({"url": "sqlite:///file:x?mode=memory"}, "needs a file"),
        ({"url": 7}, "valid string"),
        ({"poll_interval_s": 0.01}, "greater than or equal to 0.05"),
        ({"poll_interval_s": 61}, "less than or equal to 60"),
        ({"poll_interval_s": "often"}, "valid number"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        parse(values)
    (error,) = refusal.value.errors()
    assert message in error["msg"]
    assert "hunter2" not in str(refusal.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse({}).poll_interval_s = 1  # type: ignore[misc]  # that is the point
