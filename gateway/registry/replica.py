"""The replica: what handshakes need from the registry, in a memory-mapped file that every worker reads.

    replica/
      current            the name of the generation in use, replaced by rename
      <uuid>/data.mdb    one generation: a whole copy, kept up to date by the follower
      <uuid>/lock.mdb

LMDB gives lock-free readers in many processes beside one writer, and survives a crash at any moment. Five tables:

    credentials   realm id and identity (`records.identity_key`) -> CredentialRecord
    devices       device id -> the keys above that belong to it (duplicates), so that what was removed is found
    commands      device id, number -> CommandRecord
    realms        realm id -> RealmRecord
    meta          "meta" -> ReplicaMeta

Invariants. The follower alone writes. A read transaction lives for one look-up: one that stayed open would keep every
page of the file from reuse. An environment is opened after the exec of a process and never crosses a fork. No WRITEMAP:
a full disk is an error of the commit, not a SIGBUS. The file is never shorter than its pages (LMDB may leave the last
ones unwritten, the writer fills them up), so a shorter file was truncated, and reading it would kill the reader. The
lock file is allocated before it is mapped, for the same reason.
The replica is disposable: another format, another registry or damage means a new generation.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self, TypeAlias

import lmdb
import msgspec

from gateway.errors import RegistryMismatch, RegistryUnavailable
from gateway.files import sync_folder
from gateway.registry.records import CommandRecord, CredentialRecord, RealmRecord

__all__ = [
    "FORMAT",
    "MAP_BYTES",
    "Batch",
    "ReplicaMeta",
    "ReplicaReader",
    "ReplicaWriter",
    "create_generation",
    "current_generation",
    "publish_generation",
    "remove_other_generations",
]

Tables: TypeAlias = "dict[bytes, lmdb._Database]"  # noqa: SLF001 - the only name that py-lmdb gives this type
_Transaction: TypeAlias = "lmdb.Transaction[bytes]"  # generic for type checkers only

FORMAT = 3
MAP_BYTES = 16 << 30  # address space only; one million credentials take about 250 MB
_READERS_MAX = 1024  # processes that may read at a time: workers, and those that drain
_LOCK_BYTES = 64 * (_READERS_MAX + 2)
_TABLES = {  # True: duplicates
    b"credentials": False,
    b"devices": True,
    b"commands": False,
    b"realms": False,
    b"meta": False,
}
_META_KEY = b"meta"
_CURRENT = "current"
_WHOLE_TIMEOUT_S = 0.1


class ReplicaMeta(msgspec.Struct, frozen=True, array_like=True):
    """What a generation is a copy of: the registry's id, its state at `sequence`, known good at `polled_at` (Unix s)."""

    format: int
    registry_id: str
    sequence: int
    polled_at: float
    secrets: dict[str, bytes]
    """The registry's own secrets by name, sealed as they are there."""


_encode = msgspec.msgpack.Encoder().encode
_decode_credential = msgspec.msgpack.Decoder(CredentialRecord).decode
_decode_command = msgspec.msgpack.Decoder(CommandRecord).decode
_decode_realm = msgspec.msgpack.Decoder(RealmRecord).decode
_decode_meta = msgspec.msgpack.Decoder(ReplicaMeta).decode


class ReplicaReader:
    """One generation, read by a worker. For one thread; the follower may write meanwhile."""

    def __init__(self, environment: lmdb.Environment, tables: Tables) -> None:
        self._environment = environment
        self._credentials = tables[b"credentials"]
        self._commands = tables[b"commands"]
        self._realms = tables[b"realms"]
        self._meta = tables[b"meta"]
        self.damaged = 0
        """Records that could not be read since this reader was opened; each was taken as unknown."""

    @classmethod
    def open(cls, generation: Path) -> Self:
        """Open a generation for reading.

        Raises:
            RegistryMismatch: it is gone, damaged, or of another format. The follower makes a new one.

        """
        reader = cls(*_open(generation, MAP_BYTES, readonly=True, sync=True))
        if reader.meta() is None:
            reader.close()
            raise RegistryMismatch(
                f"the replica {generation} is damaged or of another version: it is copied anew"
            )
        return reader

    def credential(self, realm_id: int, identity: bytes) -> CredentialRecord | None:
        """The record of one identity of 1 to 128 bytes, or None. Takes microseconds and waits for nothing."""
        try:
            with self._environment.begin(self._credentials) as transaction:
                # records.identity_key, written out: this is the path of every handshake
                value = transaction.get(realm_id.to_bytes(8, "big") + identity)
            return None if value is None else _decode_credential(value)
        except (msgspec.DecodeError, lmdb.Error):
            self.damaged += 1
            return None

    def has_commands(self) -> bool:
        """Whether any command waits, for whichever device."""
        try:
            with self._environment.begin(self._commands) as transaction:
                return bool(transaction.stat(self._commands)["entries"])
        except lmdb.Error:
            return True

    def commands(self, device_id: int) -> list[CommandRecord]:
        """What waits for a device, in order; those that have expired may be among them."""
        prefix = _id_key(device_id)
        values: list[bytes] = []
        try:
            with (
                self._environment.begin(self._commands) as transaction,
                transaction.cursor() as cursor,
            ):
                if cursor.set_range(prefix):
                    for key, value in cursor:
                        if not key.startswith(prefix):
                            break
                        values.append(value)
            return [_decode_command(value) for value in values]
        except (msgspec.DecodeError, lmdb.Error):
            self.damaged += 1
            return []

    def realms(self) -> list[RealmRecord]:
        """Every realm, by id."""
        with _reading(), self._environment.begin(self._realms) as transaction, transaction.cursor() as cursor:
            values = [value for _, value in cursor]
        records = []
        for value in values:
            try:
                records.append(_decode_realm(value))
            except msgspec.DecodeError:
                self.damaged += 1
        return records

    def meta(self) -> ReplicaMeta | None:
        """What this generation is a copy of; None when that cannot be read."""
        with _reading(), self._environment.begin(self._meta) as transaction:
            return _parse_meta(transaction.get(_META_KEY))

    def close(self) -> None:
        self._environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ReplicaWriter:
    """One generation, written by the follower. After a failed write it is closed and opened again.

    Every method that writes raises `RegistryUnavailable` when the disk or the map is full: nothing of the batch is
    then in the replica, and the same batch may be tried again on a writer opened anew.
    """

    def __init__(self, generation: Path, environment: lmdb.Environment, tables: Tables) -> None:
        self.generation = generation
        self._environment = environment
        self._tables = tables

    @classmethod
    def open(cls, generation: Path, *, map_bytes: int = MAP_BYTES) -> Self:
        """Open an existing generation; its commits wait for the disk.

        Args:
            generation: its folder, as `create_generation` made it.
            map_bytes: the most that the file may grow to.

        Raises:
            RegistryMismatch: it is gone or damaged.

        """
        return cls(generation, *_open(generation, map_bytes, readonly=False, sync=True))

    @contextlib.contextmanager
    def batch(self) -> Iterator["Batch"]:
        """One transaction: committed at the end of the block, dropped when the block fails."""
        with _writing(self.generation):
            with self._environment.begin(write=True) as transaction:
                yield Batch(transaction, self._tables)
            self._fill_up()

    def _fill_up(self) -> None:
        """Make the file as long as its pages say it is; what LMDB left unwritten is free and never read."""
        missing = _bytes_missing(self._environment, self.generation)
        if missing > 0:
            data = self.generation / "data.mdb"
            os.truncate(data, data.stat().st_size + missing)

    def meta(self) -> ReplicaMeta | None:
        """What this generation is a copy of; None when it is unfinished, damaged or of another format."""
        with _reading(), self._environment.begin(self._tables[b"meta"]) as transaction:
            return _parse_meta(transaction.get(_META_KEY))

    def keys_of_devices(self, first_id: int, last_id: int) -> list[bytes]:
        """The identity keys that the devices of this range have in the replica."""
        with _reading(), self._environment.begin() as transaction:
            entries = _index_entries(transaction, self._tables, first_id, last_id)
            return [key for device, key in entries if _belongs(transaction, self._tables, key, device)]

    def is_whole(self) -> bool:
        """False when the file was truncated or removed: reading it would kill the reader, or read what nobody shares."""
        try:
            return _bytes_missing(self._environment, self.generation) <= 0
        except OSError:
            return False

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with _writing(self.generation):
            self._environment.sync(True)
            sync_folder(self.generation)

    def reader_check(self) -> int:
        """Free the places of readers that died; the pages they held may then be used again. Returns how many."""
        return self._environment.reader_check()

    def close(self) -> None:
        self._environment.close()


class Batch:
    """What one transaction of the follower writes."""

    def __init__(self, transaction: _Transaction, tables: Tables) -> None:
        self._transaction = transaction
        self._tables = tables

    def put_credentials(self, credentials: Mapping[bytes, CredentialRecord]) -> None:
        """Add or replace records, named by `records.identity_key`."""
        with self._transaction.cursor(self._tables[b"credentials"]) as cursor:
            cursor.putmulti([(key, _encode(record)) for key, record in sorted(credentials.items())])
        with self._transaction.cursor(self._tables[b"devices"]) as cursor:
            cursor.putmulti(sorted((_id_key(record.device_id), key) for key, record in credentials.items()))

    def put_commands(self, commands: Iterable[CommandRecord]) -> None:
        """Add or replace commands that wait."""
        for command in commands:
            key = _id_key(command.device_id) + _id_key(command.number)
            self._transaction.put(key, _encode(command), db=self._tables[b"commands"])

    def remove_devices(self, first_id: int, last_id: int) -> None:
        """Remove every credential and command of the devices in this range, both ends included."""
        self._remove_commands(first_id, last_id)
        credentials, devices = self._tables[b"credentials"], self._tables[b"devices"]
        for device_key, key in _index_entries(self._transaction, self._tables, first_id, last_id):
            if _belongs(self._transaction, self._tables, key, device_key):
                self._transaction.delete(key, db=credentials)
            self._transaction.delete(device_key, key, db=devices)

    def _remove_commands(self, first_id: int, last_id: int) -> None:
        last = _id_key(last_id)
        with self._transaction.cursor(self._tables[b"commands"]) as cursor:
            cursor.set_range(_id_key(first_id))
            while (key := cursor.key()) and key[: len(last)] <= last:
                cursor.delete()  # and stand on the next one, or nowhere

    def replace_realms(self, realms: Iterable[RealmRecord]) -> None:
        """Let these be the realms."""
        table = self._tables[b"realms"]
        self._transaction.drop(table, delete=False)
        for realm in realms:
            self._transaction.put(_id_key(realm.id), _encode(realm), db=table)

    def put_meta(self, meta: ReplicaMeta) -> None:
        """Say what the generation is a copy of once this batch is committed."""
        self._transaction.put(_META_KEY, _encode(meta), db=self._tables[b"meta"])


def create_generation(replica_dir: Path, *, map_bytes: int = MAP_BYTES) -> ReplicaWriter:
    """A new, empty, unpublished generation. Its commits do not wait for the disk: call `sync` before publishing."""
    generation = replica_dir / str(uuid.uuid4())
    with _writing(replica_dir):
        try:
            generation.mkdir(mode=0o700)
            (generation / "lock.mdb").write_bytes(bytes(_LOCK_BYTES))
            environment, tables = _open_environment(generation, map_bytes, readonly=False, sync=False)
        except BaseException:
            shutil.rmtree(generation, ignore_errors=True)
            raise
    return ReplicaWriter(generation, environment, tables)


def publish_generation(replica_dir: Path, generation: Path) -> None:
    """Let `generation`, which must be on the disk, be the one in use."""
    with _writing(replica_dir):
        draft = replica_dir / (_CURRENT + ".new")
        with draft.open("w", encoding="ascii") as file:
            file.write(generation.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(replica_dir / _CURRENT)
        sync_folder(replica_dir)


def current_generation(replica_dir: Path) -> Path | None:
    """The folder of the generation in use; None when there is none yet."""
    try:
        name = str(uuid.UUID((replica_dir / _CURRENT).read_text(encoding="ascii").strip()))
    except (OSError, ValueError):
        return None
    generation = replica_dir / name
    return generation if generation.is_dir() else None


def remove_other_generations(replica_dir: Path, keep: Path | None) -> None:
    """Remove old and half-made generations. Workers that still have one open read on until they close it."""
    for path in replica_dir.iterdir():
        if path != keep and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _open(generation: Path, map_bytes: int, *, readonly: bool, sync: bool) -> tuple[lmdb.Environment, Tables]:
    try:
        return _open_environment(generation, map_bytes, readonly=readonly, sync=sync)
    except (lmdb.Error, OSError) as exc:
        raise RegistryMismatch(
            f"the replica {generation} is gone or damaged ({exc}): it is copied anew"
        ) from exc


def _open_environment(
    generation: Path, map_bytes: int, *, readonly: bool, sync: bool
) -> tuple[lmdb.Environment, Tables]:
    environment = lmdb.open(
        str(generation),
        map_size=map_bytes,
        mode=0o600,
        create=False,
        readonly=readonly,
        sync=sync,
        metasync=sync,
        max_dbs=len(_TABLES),
        max_readers=_READERS_MAX,
        max_spare_txns=1,
    )
    try:
        _await_whole(environment, generation)
        return environment, {
            name: environment.open_db(name, create=not readonly, dupsort=several)
            for name, several in _TABLES.items()
        }
    except BaseException:
        environment.close()
        raise


def _await_whole(environment: lmdb.Environment, generation: Path) -> None:
    """Refuse a truncated file. Between a commit and `_fill_up` a good one may look so for a moment."""
    deadline = time.monotonic() + _WHOLE_TIMEOUT_S
    while _bytes_missing(environment, generation) > 0:
        if time.monotonic() > deadline:
            raise RegistryMismatch(f"the replica {generation} is truncated: it is copied anew")
        time.sleep(0.005)


def _bytes_missing(environment: lmdb.Environment, generation: Path) -> int:
    """How far the file is behind its pages, by the head of the file alone: nothing behind it is touched."""
    pages = environment.info()["last_pgno"] + 1
    return pages * environment.stat()["psize"] - (generation / "data.mdb").stat().st_size


def _index_entries(
    transaction: _Transaction, tables: Tables, first_id: int, last_id: int
) -> list[tuple[bytes, bytes]]:
    last = _id_key(last_id)
    entries: list[tuple[bytes, bytes]] = []
    with transaction.cursor(tables[b"devices"]) as cursor:
        if cursor.set_range(_id_key(first_id)):
            for device_key, key in cursor:
                if device_key > last:
                    break
                entries.append((device_key, key))
    return entries


def _belongs(transaction: _Transaction, tables: Tables, key: bytes, device_key: bytes) -> bool:
    """Whether the credential `key` is this device's: its identity may have gone to another one meanwhile."""
    value = transaction.get(key, db=tables[b"credentials"])
    try:
        return value is None or _id_key(_decode_credential(value).device_id) == device_key
    except msgspec.DecodeError:
        return True


def _parse_meta(value: bytes | None) -> ReplicaMeta | None:
    if value is None:
        return None
    try:
        meta = _decode_meta(value)
    except msgspec.DecodeError:
        return None
    return meta if meta.format == FORMAT else None


def _id_key(number: int) -> bytes:
    return number.to_bytes(8, "big")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except lmdb.Error as exc:
        raise RegistryMismatch(f"the replica is damaged ({exc}): it is copied anew") from exc


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.Error, OSError) as exc:
        raise RegistryUnavailable(
            f"the replica {place} cannot be written ({exc}): make room on its disk"
        ) from exc
