"""Where master keys come from."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway.errors import ConfigurationError, RegistryMismatch
from gateway.registry.masterkeys import KeyRing, MasterKeySource
from gateway.registry.sealing import MasterKey, Sealer
from gateway.registry.settings import RegistrySettings

OLD, NEW = "11" * 32, "22" * 32


def settings(tmp_path: Path, **values: object) -> RegistrySettings:
    return RegistrySettings.model_validate(values, context={"base": tmp_path})


def test_the_environment_takes_the_place_of_the_file(tmp_path: Path) -> None:
    source = settings(tmp_path, master_key=f"{NEW}\n{OLD}").master_keys()
    assert [key.id for key in source.load()] == [MasterKey(bytes.fromhex(text)).id for text in (NEW, OLD)]
    assert source.place == "registry.master_key"


def test_a_text_that_is_no_key_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        settings(tmp_path, master_key="deadbeef").master_keys().load()
    assert str(caught.value).startswith("registry.master_key must hold 64 hex digits and nothing else")
    assert "deadbeef" not in str(caught.value)
    shown = settings(tmp_path, master_key=OLD)
    assert OLD not in repr(shown)
    assert OLD not in shown.model_dump_json()
    assert OLD not in repr(shown.master_keys())


def test_a_systemd_credential_is_read_whatever_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "psk-master").write_text(OLD + "\n")
    (tmp_path / "psk-master").chmod(0o440)
    wanted = settings(tmp_path, master_key_credential="psk-master")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigurationError, match="LoadCredential=psk-master:FILE"):
        wanted.master_keys()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert wanted.master_keys().load()[0].id == MasterKey(bytes.fromhex(OLD)).id
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="credential psk-master does not exist"):
        wanted.master_keys().load()


@pytest.mark.parametrize("name", ["../master.key", "a/b", ""])
def test_a_credential_is_a_name_and_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError):
        settings(tmp_path, master_key_credential=name)


def test_a_command_prints_them(tmp_path: Path) -> None:
    source = settings(tmp_path, master_key_command=("echo", OLD)).master_keys()
    assert source.load()[0].id == MasterKey(bytes.fromhex(OLD)).id


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("/nonexistent/vault",), "cannot be started: No such file or directory"),
        (("sh", "-c", "echo secret-part; exit 3"), "sh ended with status 3: run it by hand"),
        (("head", "-c", "10000", "/dev/zero"), "has more than 4096 bytes"),
    ],
)
def test_a_command_that_fails_is_named_without_its_output(
    tmp_path: Path, command: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        settings(tmp_path, master_key_command=command).master_keys()
    assert "secret-part" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="master_key and master_key_command are given: keep one"):
        settings(tmp_path, master_key=OLD, master_key_command=("true",))


def test_a_ring_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_text(OLD)
    path.chmod(0o600)
    ring = KeyRing(MasterKeySource(name="the file", path=path))
    sealed_before = ring.sealer.seal(b"x", b"")
    assert not ring.refresh()

    path.write_text(f"{NEW}\n{OLD}\n")
    assert ring.refresh()
    assert not ring.refresh()
    assert ring.sealer.open(sealed_before, b"") == b"x"
    sealed = ring.sealer.seal(b"y", b"")
    assert Sealer([MasterKey(bytes.fromhex(NEW))]).open(sealed, b"") == b"y"

    path.write_text("half a k")
    with pytest.raises(ConfigurationError):
        ring.refresh()
    assert not ring.refresh(), "it is said once"
    assert ring.sealer.open(sealed, b"") == b"y"

    path.write_text(NEW)
    assert ring.refresh()
    with pytest.raises(RegistryMismatch):
        ring.sealer.open(sealed_before, b"")


def test_at_most_sixteen_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds 17 master keys: at most 16"):
        settings(tmp_path, master_key="\n".join([OLD] * 17)).master_keys().load()
