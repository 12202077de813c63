"""Which key a device uses."""

from pathlib import Path

import pytest

from gateway.device.keyring import DeviceKey, KeyRing, read_key_file
from gateway.errors import ConfigurationError, DeviceRefused, RegistryRefused
from gateway.registry.sealing import Key

KEY = Key(bytes(range(16)))
OTHER = Key(bytes(range(16, 48)))


def test_one_key_without_a_hint_is_for_any() -> None:
    ring = KeyRing.of("meter-7", KEY)
    assert ring.key_for(None) is ring.key_for("anything") is ring.default


def test_a_hint_chooses_and_an_unknown_one_is_refused() -> None:
    north, south = DeviceKey("n", KEY, "north"), DeviceKey("s", OTHER, "south")
    ring = KeyRing([north, south])
    assert ring.key_for("north") is north
    assert ring.key_for("south") is south
    assert ring.key_for(None) is north
    with pytest.raises(DeviceRefused, match=r"hint is 'east'.*'north', 'south'"):
        ring.key_for("east")


def test_the_default_is_the_one_named_else_the_one_without_a_hint() -> None:
    north, south, any_ = DeviceKey("n", KEY, "north"), DeviceKey("s", OTHER, "south"), DeviceKey("a", KEY)
    assert KeyRing([north, south], south).key_for(None) is south
    ring = KeyRing([north, any_])
    assert ring.key_for(None) is any_
    assert ring.key_for("elsewhere") is any_


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ([], ConfigurationError),
        ([DeviceKey("a", KEY, "h"), DeviceKey("b", KEY, "h")], ConfigurationError),
        ([DeviceKey("a", KEY), DeviceKey("b", KEY)], ConfigurationError),
        ([DeviceKey("a", KEY, hash_name="md5")], ConfigurationError),
        ([DeviceKey("", KEY)], RegistryRefused),
        ([DeviceKey("a", Key(b"short"))], RegistryRefused),
        ([DeviceKey("a", KEY, "")], RegistryRefused),
    ],
)
def test_a_ring_that_cannot_work_is_refused(keys: list[DeviceKey], error: type[Exception]) -> None:
    with pytest.raises(error):
        KeyRing(keys)


def test_a_ring_shows_no_key() -> None:
    ring = KeyRing.of("meter-7", KEY, hint="north")
    assert repr(ring) == "KeyRing('north': 'meter-7')"
    assert KEY.hex() not in repr(ring.default)


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_ring_in_a_file(tmp_path: Path) -> None:
    private(tmp_path / "south.key", OTHER.hex() + "\n")
    path = private(
        tmp_path / "ring.toml",
        f"""
        [[keys]]
        hint = "north"
        identity = "n"
        key = "{KEY.hex()}"
        [[keys]]
        hint = "south"
        identity = "s"
        key_file = "south.key"
        hash = "sha384"
        default = true
        """,
    )
    ring = KeyRing.from_file(path)
    assert ring.keys == (DeviceKey("n", KEY, "north"), DeviceKey("s", OTHER, "south", "sha384"))
    assert ring.default is ring.keys[1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("keys = 3", r"\[\[keys\]\]"),
        ("[[keys]", "not TOML"),
        ("", r"\[\[keys\]\]"),
        ('[[keys]]\nidentity = "a"', "either key"),
        ('[[keys]]\nidentity = "a"\nkey = "zz"', "not hex"),
        ('[[keys]]\nidentity = "a"\nkey = 3', "must be a text"),
        ('[[keys]]\nkey = "00"', "no identity"),
        ('[[keys]]\nidentity = "a"\nkye = "00"', "unknown key 'kye'"),
        ('[[keys]]\nidentity = "a"\nkey_file = "none"', "cannot be read"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = private(tmp_path / "ring.toml", text)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        KeyRing.from_file(path)
    assert str(path) in str(caught.value)


def test_two_defaults_are_refused(tmp_path: Path) -> None:
    table = f'[[keys]]\nhint = "{{0}}"\nidentity = "a"\nkey = "{KEY.hex()}"\ndefault = true\n'
    with pytest.raises(ConfigurationError, match="keep one"):
        KeyRing.from_file(private(tmp_path / "ring.toml", table.format("x") + table.format("y")))


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = private(tmp_path / "key", KEY.hex())
    assert read_key_file(path) == KEY
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match=r"others \(mode 0640\): run `chmod 600"):
        read_key_file(path)
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_key_file(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="not hex"):
        read_key_file(private(tmp_path / "bad", "xyz"))
    with pytest.raises(ConfigurationError, match="more than"):
        read_key_file(private(tmp_path / "long", "0" * 70_000))
