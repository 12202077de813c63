import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from gateway.errors import ConfigurationError, RegistryMismatch
from gateway.registry.sealing import (
    Key,
    MasterKey,
    Sealer,
    credential_context,
    fingerprint,
    secret_context,
)

PLAIN = bytes(range(32))
CONTEXT = credential_context(1, b"meter-1")


@pytest.fixture
def master_key() -> MasterKey:
    return MasterKey(bytes(range(100, 132)))


@pytest.fixture
def sealer(master_key: MasterKey) -> Sealer:
    return Sealer([master_key])


def test_what_is_sealed_opens(sealer: Sealer) -> None:
    sealed = sealer.seal(PLAIN, CONTEXT)
    assert sealer.open(sealed, CONTEXT) == PLAIN
    assert PLAIN not in sealed
    assert len(sealed) == 1 + 4 + 12 + 32 + 16


def test_sealing_twice_gives_different_bytes(sealer: Sealer) -> None:
    assert sealer.seal(PLAIN, CONTEXT) != sealer.seal(PLAIN, CONTEXT)


@pytest.mark.parametrize(
    "context",
    [
        credential_context(2, b"meter-1"),
        credential_context(1, b"meter-2"),
        credential_context(1, b"meter-1 "),
        secret_context("meter-1"),
        b"",
    ],
)
def test_a_key_that_was_moved_does_not_open(sealer: Sealer, context: bytes) -> None:
    with pytest.raises(RegistryMismatch, match="changed, or moved from another row"):
        sealer.open(sealer.seal(PLAIN, CONTEXT), context)


@given(st.integers(0, 1 + 4 + 12 + 32 + 16 - 1), st.integers(1, 255))
def test_a_key_that_was_changed_does_not_open(position: int, change: int) -> None:
    sealer = Sealer([MasterKey(bytes(32))])
    sealed = bytearray(sealer.seal(PLAIN, CONTEXT))
    sealed[position] ^= change
    with pytest.raises(RegistryMismatch):
        sealer.open(bytes(sealed), CONTEXT)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_do_not_open(raw: bytes) -> None:
    with pytest.raises(RegistryMismatch):
        Sealer([MasterKey(bytes(32))]).open(raw, CONTEXT)


def test_a_key_that_was_cut_does_not_open(sealer: Sealer) -> None:
    sealed = sealer.seal(PLAIN, CONTEXT)
    for size in range(len(sealed)):
        with pytest.raises(RegistryMismatch):
            sealer.open(sealed[:size], CONTEXT)


def test_another_master_key_is_named(sealer: Sealer, master_key: MasterKey) -> None:
    other = MasterKey.generate()
    with pytest.raises(
        RegistryMismatch, match=f"under master key {master_key.id.hex()}, which is not configured"
    ):
        Sealer([other]).open(sealer.seal(PLAIN, CONTEXT), CONTEXT)


def test_several_master_keys_open_and_the_first_seals(sealer: Sealer, master_key: MasterKey) -> None:
    new = MasterKey.generate()
    both = Sealer([new, master_key])
    assert both.open(sealer.seal(PLAIN, CONTEXT), CONTEXT) == PLAIN
    assert Sealer([new]).open(both.seal(PLAIN, CONTEXT), CONTEXT) == PLAIN


def test_contexts_do_not_run_into_each_other() -> None:
    assert credential_context(1, b"a") != credential_context(1, b"a\x00")
    assert (
        len(
            {
                credential_context(realm, identity)
                for realm in (1, 256)
                for identity in (b"", b"\x01", b"\x00")
            }
        )
        == 6
    )


def test_a_key_shows_its_length_only() -> None:
    key = Key(b"sixteen bytes...")
    for text in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert text.strip("[]") == "Key(<16 bytes>)"
    assert (key.reveal(), key.hex(), len(key)) == (
        b"sixteen bytes...",
        "7369787465656e2062797465732e2e2e",
        16,
    )
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_keys_compare_by_value() -> None:
    assert Key(PLAIN) == Key(bytes(range(32)))
    assert Key(PLAIN) != Key(bytes(32))
    assert Key(PLAIN) != PLAIN
    assert len({Key(PLAIN), Key(PLAIN)}) == 1
    assert len(Key.generate()) == 32
    assert Key.generate() != Key.generate()


def test_a_master_key_is_written_once_and_read(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    key = MasterKey.generate()
    key.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert MasterKey.from_file(path).id == key.id
    sealed = Sealer([key]).seal(PLAIN, CONTEXT)
    assert Sealer([MasterKey.from_file(path)]).open(sealed, CONTEXT) == PLAIN
    with pytest.raises(ConfigurationError, match="is there already"):
        MasterKey.generate().write(path)
    assert MasterKey.from_file(path).id == key.id
    with pytest.raises(ConfigurationError, match="cannot be written: No such file or directory"):
        key.write(tmp_path / "none" / "master.key")


def test_a_master_key_outlives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its name in the folder, which is on the disk apart from its content, all keys would be lost."""
    on_disk: list[int] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        fsync(descriptor)
        on_disk.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", spy)  # which calls the real one
    path = tmp_path / "master.key"
    MasterKey.generate().write(path)
    assert on_disk == [path.stat().st_ino, tmp_path.stat().st_ino]


def test_a_master_key_is_not_shown() -> None:
    key = MasterKey(bytes(range(32)))
    assert repr(key) == f"MasterKey(id={key.id.hex()})"
    assert bytes(range(32)).hex() not in repr(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_master_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "master.key"
    MasterKey.generate().write(path)
    path.chmod(mode)
    with pytest.raises(
        ConfigurationError, match=rf"open to others \(mode {mode:04o}\): run `chmod 600 {path}`"
    ):
        MasterKey.from_file(path)


@pytest.mark.parametrize(
    "content", [b"", b"00" * 31, b"00" * 33, b"zz" * 32, b"00" * 32 + b"\nmore", bytes(32), b"\xff" * 64]
)
def test_a_master_key_file_that_holds_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="must hold 64 hex digits and nothing else"):
        MasterKey.from_file(path)


def test_a_master_key_file_that_is_missing_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none does not exist"):
        MasterKey.from_file(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        MasterKey.from_file(tmp_path)


def test_a_sealer_needs_a_key_and_a_key_32_bytes() -> None:
    with pytest.raises(ConfigurationError):
        Sealer([])
    with pytest.raises(ConfigurationError):
        MasterKey(bytes(16))


def test_fingerprints_find_the_same_key_under_one_secret_only() -> None:
    assert fingerprint(b"secret", Key(PLAIN)) == fingerprint(b"secret", Key(PLAIN))
    assert fingerprint(b"secret", Key(PLAIN)) != fingerprint(b"secret", Key(bytes(32)))
    assert fingerprint(b"secret", Key(PLAIN)) != fingerprint(b"another", Key(PLAIN))
    assert len(fingerprint(b"secret", Key(PLAIN))) == 16
