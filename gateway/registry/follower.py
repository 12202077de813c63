"""The follower: carries every change of the registry into this node's replica, and says what changed.

One per node, in a process of its own, driven by a shell that calls `poll`, sends the notices to the workers, and calls
again: at once while `behind`, otherwise after the poll interval. It has no thread and no clock of its own.

States. Without a usable generation (none, foreign, damaged, or behind what the feed still holds) a poll copies
everything into a new one, publishes it and removes the old; workers read the old one until they are told. With a
generation, a poll reads the feed's one row, then the changes since, then the rows that they name, and writes these in
one transaction, which is on the disk before the notice is given.

A copy takes the feed's sequence first and the rows afterwards, page by page: what was written meanwhile has a higher
sequence and is read again by the polls that follow.

When the replica cannot be written (a full disk), the workers are told all the same: the notice has an overlay with all
that the replica lacks, the changes are kept and tried again with every poll, and once they are written a notice with
an empty overlay says so. A revocation that was seen is never forgotten.
"""

import datetime as dt
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs
from sqlalchemy import Connection

from gateway.errors import ConfigurationError, RegistryError, RegistryMismatch, RegistryUnavailable
from gateway.registry import commands, feed
from gateway.registry.database import make_engine, read, write
from gateway.registry.migrate import check_schema
from gateway.registry.notices import Changed, IdRanges, Notice, Overlay, Published
from gateway.registry.records import CommandRecord, RealmRecord
from gateway.registry.replica import (
    FORMAT,
    MAP_BYTES,
    ReplicaMeta,
    ReplicaWriter,
    create_generation,
    current_generation,
    publish_generation,
    remove_other_generations,
)
from gateway.registry.settings import RegistrySettings

__all__ = ["CopyProgress", "Follower", "FollowerStatus"]

_CHANGES_PER_POLL = 1_000
_DEVICES_PER_POLL = 20_000
"""A poll takes no further change once its ranges name this many devices; a single change is always taken whole."""
_UNWRITTEN_DEVICES_MAX = 50_000
"""While the replica cannot be written and this many devices wait, no further change is read: they are held in memory."""
_POLL_TIME_STORED_EVERY_S = 60


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """A full copy under way: credentials copied so far, and how many there were when it began."""

    copied: int
    total: int


@dataclass(frozen=True, slots=True)
class FollowerStatus:
    """What the node knows of the registry."""

    sequence: int
    """The state that the workers were told of."""
    polled_at: float
    """When the registry last answered, Unix s; 0: never."""
    fault: str | None = None
    """Why the replica cannot be written, while it cannot."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """Changes, and the rows that they name as the registry has them now."""

    sequence: int
    devices: IdRanges
    committed_at: float
    credentials: feed.Credentials
    commands: list[CommandRecord]
    realms: list[RealmRecord] | None
    """All of them, when one of them changed."""
    secrets: dict[str, bytes] | None = None
    """The registry's own, sealed; they are sealed anew together with those of the realms."""


class Follower:
    """Follows one registry into one replica folder.

    For one thread; `progress`, `status` and `overlay` may be read, and `credential_states` called, from another.

    Args:
        settings: where the registry is.
        replica_dir: the replica of this node, and of no other follower.
        wall: gives the time, Unix s.
        map_bytes: the most that a generation may grow to.

    """

    def __init__(
        self,
        settings: RegistrySettings,
        replica_dir: Path,
        *,
        wall: Callable[[], float],
        map_bytes: int = MAP_BYTES,
    ) -> None:
        self._engine = make_engine(settings.url)
        self._replica_dir = replica_dir
        self._wall = wall
        self._map_bytes = map_bytes
        self._lock: int | None = None
        self._schema_is_known = False
        self._generation: Path | None = None
        self._writer: ReplicaWriter | None = None
        self._meta: ReplicaMeta | None = None
        self._unwritten: _Reading | None = None
        self.overlay: Overlay = {}
        """What the replica lacks, see `Changed`: a worker that starts needs it too."""
        self.behind = False
        """There is more to read: poll again at once."""
        self.progress: CopyProgress | None = None
        self.status = FollowerStatus(sequence=0, polled_at=0)

    def open(self) -> Path | None:
        """Take the folder, and give the generation in it that workers can use at once, whatever the registry does.

        Raises:
            ConfigurationError: the folder cannot be used, or another follower uses it.

        """
        self._lock = _lock_folder(self._replica_dir)
        self._generation = current_generation(self._replica_dir)
        if self._generation is not None:
            self._meta = self._open_writer()
        if self._meta is None:
            self._generation = None
        else:
            self.status = FollowerStatus(self._meta.sequence, self._meta.polled_at)
            self.reader_check()
        remove_other_generations(self._replica_dir, self._generation)
        return self._generation

    def close(self) -> None:
        """Let go of everything; `open` may be called again."""
        self._close_writer()
        self._engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def reader_check(self) -> int:
        """To be called when a worker died: frees the places that it held in the replica. Returns how many."""
        return 0 if self._writer is None else self._writer.reader_check()

    def credential_states(self) -> dict[str, int]:
        """How many credentials the registry has, by state; reads them all, so for a thread of its own.

        Raises:
            RegistryUnavailable, RegistryMismatch: as `poll`.

        """
        with read(self._engine) as connection:
            return feed.credential_states(connection, self._wall())

    def devices_expiring(self, within_s: float) -> int:
        """How many devices will be shut out in `within_s` seconds; as `credential_states`, for a thread of its own.

        Raises:
            RegistryUnavailable, RegistryMismatch: as `poll`.

        """
        with read(self._engine) as connection:
            return feed.devices_expiring(connection, self._wall(), within_s)

    def poll(self) -> list[Notice]:
        """Look for changes once, and carry them into the replica.

        Returns:
            What the workers have to be told, in order. Nothing when nothing changed.

        Raises:
            RegistryUnavailable: the registry is away, or a full copy is needed and the disk is full. Poll again later.
            RegistryMismatch: it is there and does not fit. Poll again later: it may be migrated meanwhile.

        """
        assert self._lock is not None, "the follower is not open"
        self._check_writer()
        self.behind = False
        try:
            reading = self._read()
        except RegistryError:
            self._schema_is_known = False
            raise
        self.status = replace(self.status, polled_at=self._wall())
        if isinstance(reading, Published):
            return [reading]
        if reading is None:
            self._store_poll_time()
            return []
        return self._carry(reading)

    # Writing the registry: what a running gateway has to say there goes through here

    def remove_commands(self, numbers: Iterable[int]) -> None:
        """Remove commands that were delivered. Raises as `poll`; they may be given again."""
        now = dt.datetime.fromtimestamp(self._wall(), dt.UTC)
        write(self._engine, lambda connection: commands.remove_commands(connection, numbers, now))

    def remove_expired_commands(self) -> int:
        """Remove commands that waited too long, some at a time; how many. Raises as `poll`."""
        now = dt.datetime.fromtimestamp(self._wall(), dt.UTC)
        return write(self._engine, lambda connection: commands.remove_expired_commands(connection, now))

    # Reading the registry

    def _read(self) -> _Reading | Published | None:
        if not self._schema_is_known:
            check_schema(self._engine)
            self._schema_is_known = True
        with read(self._engine) as connection:
            head = feed.head(connection)
            changes = self._new_changes(connection, head)
            if changes is None:
                return self._copy(connection, head)
            self.behind = bool(changes) and changes[-1].sequence < head.sequence
            return self._reading(connection, changes)

    def _new_changes(self, connection: Connection, head: feed.Head) -> list[feed.Change] | None:
        """The next changes, as many as one poll takes; None when they do not lead from here to the registry."""
        told = self.status.sequence
        if self._meta is None or self._meta.registry_id != head.registry_id:
            return None
        if not head.pruned_through <= told <= head.sequence:  # a restored backup may be behind what we know
            return None
        if told == head.sequence or _width(self._unwritten) > _UNWRITTEN_DEVICES_MAX:
            return []
        changes = feed.changes_after(connection, told, _CHANGES_PER_POLL)
        if not changes or [change.sequence for change in changes] != list(
            range(told + 1, changes[-1].sequence + 1)
        ):
            return None  # pruned since we read the head
        return _portion(changes)

    def _reading(self, connection: Connection, changes: list[feed.Change]) -> _Reading | None:
        """The rows that the changes name, those among them that could not be written before."""
        unwritten = self._unwritten
        if not changes:
            return unwritten
        ranges = [
            (change.first_id, change.last_id)
            for change in changes
            if change.scope == "device" and not change.is_use
        ]
        realms = any(change.scope == "realm" for change in changes)
        committed_at = [change.at for change in changes]
        if unwritten is not None:
            ranges += unwritten.devices
            realms = realms or unwritten.realms is not None
            committed_at.append(unwritten.committed_at)
        devices = merged(ranges)
        credentials = feed.credentials_of_devices(connection, devices)
        if unwritten is not None or any(change.is_use for change in changes):
            assert self._meta is not None
            credentials |= feed.credentials_used(connection, self._meta.sequence, changes[-1].sequence)
        return _Reading(
            sequence=changes[-1].sequence,
            devices=devices,
            committed_at=min(committed_at),
            credentials=credentials,
            commands=commands.commands_of_devices(connection, devices),
            realms=feed.realms(connection) if realms else None,
            secrets=feed.secrets(connection) if realms else None,
        )

    # Writing the replica

    def _carry(self, reading: _Reading) -> list[Notice]:
        news = reading.sequence > self.status.sequence
        fault = self._write(reading)
        if fault is None:
            self._unwritten, self.overlay = None, {}
        else:
            self._unwritten, self.overlay = reading, self._lacking(reading)
        self.status = replace(self.status, sequence=reading.sequence, fault=fault)
        if not news and fault is not None:
            return []
        return [
            Changed(
                sequence=reading.sequence,
                devices=reading.devices,
                realms=reading.realms is not None,
                committed_at=reading.committed_at,
                overlay=self.overlay,
            )
        ]

    def _write(self, reading: _Reading) -> str | None:
        """Write it all or nothing; why not, when the disk is full."""
        assert self._writer is not None
        assert self._meta is not None
        meta = structs.replace(self._meta, sequence=reading.sequence, polled_at=self.status.polled_at)
        if reading.secrets is not None:
            meta = structs.replace(meta, secrets=reading.secrets)
        try:
            with self._writer.batch() as batch:
                for first_id, last_id in reading.devices:
                    batch.remove_devices(first_id, last_id)
                batch.put_credentials(reading.credentials)
                batch.put_commands(reading.commands)
                if reading.realms is not None:
                    batch.replace_realms(reading.realms)
                batch.put_meta(meta)
        except RegistryUnavailable as exc:
            self._close_writer()  # LMDB may refuse everything after a failed commit, until it is opened anew
            self._meta = self._open_writer()
            return str(exc)
        self._meta = meta
        return None

    def _lacking(self, reading: _Reading) -> Overlay:
        """What the replica has to be overlaid with so that the workers see what was read."""
        overlay: Overlay = {}
        if self._writer is not None:
            for first_id, last_id in reading.devices:
                overlay.update(dict.fromkeys(self._writer.keys_of_devices(first_id, last_id)))
        overlay.update(reading.credentials)
        return overlay

    def _store_poll_time(self) -> None:
        """Now and then, so that the age of the replica survives a restart."""
        assert self._writer is not None
        assert self._meta is not None
        now = self.status.polled_at
        if abs(now - self._meta.polled_at) < _POLL_TIME_STORED_EVERY_S:
            return
        nothing = _Reading(self.status.sequence, (), now, {}, [], None)
        self.status = replace(self.status, fault=self._write(nothing))

    # Generations

    def _copy(self, connection: Connection, head: feed.Head) -> Published:
        """Copy the whole registry into a new generation and publish it."""
        self.progress = CopyProgress(0, feed.credential_count(connection))
        meta = ReplicaMeta(FORMAT, head.registry_id, head.sequence, self._wall(), feed.secrets(connection))
        writer = create_generation(self._replica_dir, map_bytes=self._map_bytes)
        try:
            self._fill(writer, connection, meta)
            writer.sync()
            publish_generation(self._replica_dir, writer.generation)
        except BaseException:
            shutil.rmtree(writer.generation, ignore_errors=True)
            raise
        finally:
            writer.close()
            self.progress = None
        self._close_writer()
        self._generation = writer.generation
        self._meta = self._open_writer()
        remove_other_generations(self._replica_dir, self._generation)
        self._unwritten, self.overlay, self.behind = None, {}, True
        self.status = replace(self.status, sequence=head.sequence, fault=None)
        return Published(str(self._generation), head.sequence)

    def _fill(self, writer: ReplicaWriter, connection: Connection, meta: ReplicaMeta) -> None:
        assert self.progress is not None
        for page in feed.credential_pages(connection):
            with writer.batch() as batch:
                batch.put_credentials(page)
            self.progress = CopyProgress(self.progress.copied + len(page), self.progress.total)
        for waiting in commands.command_pages(connection):
            with writer.batch() as batch:
                batch.put_commands(waiting)
        with writer.batch() as batch:
            batch.replace_realms(feed.realms(connection))
            batch.put_meta(meta)

    def _check_writer(self) -> None:
        """Give up a generation that was truncated or removed from under us; the poll copies anew."""
        if self._writer is not None and not self._writer.is_whole():
            self._close_writer()
            self._meta = None

    def _open_writer(self) -> ReplicaMeta | None:
        """Open the generation to write; None when it is no use."""
        assert self._generation is not None
        try:
            self._writer = ReplicaWriter.open(self._generation, map_bytes=self._map_bytes)
            meta = self._writer.meta()
        except RegistryMismatch:
            meta = None
        if meta is None:
            self._close_writer()
        return meta

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def merged(ranges: Iterable[tuple[int, int]]) -> IdRanges:
    """The same ids in as few ranges as possible, ascending."""
    result: list[tuple[int, int]] = []
    for first_id, last_id in sorted(ranges):
        if result and first_id <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(result[-1][1], last_id))
        else:
            result.append((first_id, last_id))
    return tuple(result)


def _portion(changes: list[feed.Change]) -> list[feed.Change]:
    """The first of these changes, as many as one transaction of the replica should take."""
    devices = 0
    for number, change in enumerate(changes, start=1):
        devices += change.width
        if devices >= _DEVICES_PER_POLL:
            return changes[:number]
    return changes


def _width(reading: _Reading | None) -> int:
    if reading is None:
        return 0
    return sum(last_id - first_id + 1 for first_id, last_id in reading.devices)


def _lock_folder(folder: Path) -> int:
    """Be the only follower here until the file that is given is closed, or this process ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "follower.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise ConfigurationError(f"the replica folder {folder} cannot be used: {exc.strerror}") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        raise ConfigurationError(
            f"the replica folder {folder} is in use by another gateway: give each its own node.data_dir"
        ) from exc
    return lock
