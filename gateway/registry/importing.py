"""Importing a file of devices: checked whole, then written chunk by chunk.

A chunk is one transaction with one change of the feed (several only where the devices that it changes lie far apart),
one row of the audit, and the place in the file that it came to, see `imports`. So an import that ends at any moment,
by Ctrl-C, SIGKILL or a database that goes away, has written whole chunks, and the same command goes on behind them.
When the last chunk is written the place is forgotten with it: the same command begins anew.

The file is streamed, three times: for its digest, for the check, and for the writing. Of what was read before, the check
keeps 8 bytes for each name and identity, to find those that stand twice.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

import msgspec
from sqlalchemy import Connection, Engine

from gateway.errors import RegistryRefused
from gateway.registry import identities, imports
from gateway.registry.database import read, write
from gateway.registry.formats import FORMATS
from gateway.registry.formats.base import FileDevice, Format, Ignored
from gateway.registry.formats.keys import KeyEncoding
from gateway.registry.formats.source import BadLine, DeviceFile
from gateway.registry.import_plan import Add, OnConflict, Planner, Same, Skip, Step, Update
from gateway.registry.import_write import SharedKeys, write_steps
from gateway.registry.imports import ImportJob, Place
from gateway.registry.ledger import Entry, Ledger
from gateway.registry.realms import KnownRealm, known_realm
from gateway.registry.vault import Vault

__all__ = ["Finding", "ImportCounts", "ImportOptions", "Importer", "Verdict"]

_CREDENTIALS_PER_CHUNK: Final = 2_000
"""Other writers wait for as long as a chunk takes, some tenths of a second."""
_GAP_MAX: Final = 20
"""Devices that nobody changed are read again by followers rather than a range of ids is split for fewer of them."""

Verdict = Literal["add", "update", "same", "skip", "done", "ignore", "bad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """How to read a file, and what to do with what is there already."""

    format: str
    realm: str = "default"
    key_encoding: KeyEncoding | None = None
    """None: as the format has it."""
    on_conflict: OnConflict = "fail"
    group: str | None = None
    """Of devices that have none in the file."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of every device, beside those in the file."""


class Finding(NamedTuple):
    """What becomes of a line: `text` is the device and what changes, or why the line is bad or ignored."""

    line: int
    verdict: Verdict
    text: str


@dataclass(slots=True)
class ImportCounts:
    """Devices so far; `done` are those of an earlier, interrupted run."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0
    done: int = 0
    shared: SharedKeys = field(default_factory=SharedKeys)

    @property
    def devices(self) -> int:
        return self.added + self.updated + self.unchanged + self.skipped + self.done


class Importer:
    """One import: open it, go through `check` to its end, then, when nothing was bad, through `write`."""

    def __init__(
        self, engine: Engine, ledger: Ledger, vault: Vault, path: Path, options: ImportOptions
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._vault = vault
        self._options = options
        self._format: Format = FORMATS[options.format]
        self.file = DeviceFile(path)
        self.begins_after = Place()
        """Where an interrupted run of the same import came to."""
        self.devices = 0
        """How many the check found."""

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _open(self) -> None:
        """Raises RegistryRefused: unknown realm, invalid group or label, or no file that could be imported."""
        options = self._options
        group = None if options.group is None else identities.parse_group(options.group)
        labels = identities.parse_labels(options.labels)
        with read(self._engine) as connection:
            realm = known_realm(connection, options.realm)
            self._planner = Planner(self._vault, realm, options.on_conflict, group, labels)
            self._job = ImportJob(self._digest(), realm.id, _digest_of(options))
            self.begins_after = imports.place_of(connection, self._job)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for block in self.file.blocks():
            digest.update(block)
        return digest.hexdigest()

    # The check

    def check(self) -> Iterator[Finding]:
        """Go through the whole file and hold it against the registry; nothing is written."""
        seen = _Seen()
        batch: list[Finding | FileDevice] = []
        size = 0
        for parsed in self._format.read(self.file, self._encoding):
            if isinstance(parsed, Ignored):
                batch.append(Finding(parsed.line, "ignore", parsed.reason))
                continue
            fault = parsed if isinstance(parsed, BadLine) else seen.fault(parsed)
            if fault is not None:
                batch.append(Finding(fault.line, "bad", fault.reason))
                continue
            assert isinstance(parsed, FileDevice)
            self.devices += 1
            if self.devices <= self.begins_after.devices:
                batch.append(Finding(parsed.line, "done", parsed.name or parsed.credentials[0].identity))
                continue
            batch.append(parsed)
            size += len(parsed.credentials)
            if size >= _CREDENTIALS_PER_CHUNK:
                yield from self._held_against_registry(batch)
                batch, size = [], 0
        yield from self._held_against_registry(batch)

    def _held_against_registry(self, batch: list[Finding | FileDevice]) -> Iterator[Finding]:
        devices = [each for each in batch if isinstance(each, FileDevice)]
        steps: Iterator[Step] = iter(())
        if devices:
            with read(self._engine) as connection:
                steps = iter(self._planner.plan(connection, devices))
        for each in batch:
            yield _finding(next(steps)) if isinstance(each, FileDevice) else each

    @property
    def _encoding(self) -> KeyEncoding:
        return self._options.key_encoding or self._format.key_encoding

    # The writing

    def write(self) -> Iterator[ImportCounts]:
        """Write the file that was checked, behind what is there of it; the counts after each chunk, always the same object.

        Raises:
            RegistryRefused: the registry or the file changed since the check. What was given before is written.

        """
        place = self.begins_after
        counts = ImportCounts(done=place.devices)
        for chunk in self._chunks(place.devices):
            after = Place(place.devices + len(chunk), chunk[-1].last_line)
            self.file.check_unchanged()
            work = partial(self._write_chunk, chunk=chunk, before=place, after=after)
            steps, shared = write(self._engine, work)
            _count(counts, steps, shared)
            place = after
            yield counts

    def _chunks(self, done: int) -> Iterator[list[FileDevice]]:
        chunk: list[FileDevice] = []
        size = number = 0
        for parsed in self._format.read(self.file, self._encoding):
            if not isinstance(parsed, FileDevice):
                continue  # ignored; bad ones were found by the check
            number += 1
            if number <= done:
                continue
            chunk.append(parsed)
            size += len(parsed.credentials)
            if size >= _CREDENTIALS_PER_CHUNK:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _write_chunk(
        self, connection: Connection, *, chunk: list[FileDevice], before: Place, after: Place
    ) -> tuple[list[Step], SharedKeys]:
        realm = known_realm(connection, self._options.realm)
        if realm.id != self._job.realm_id:
            raise RegistryRefused(f"realm {realm.name!r} was removed and added anew: start the import again")
        steps = self._planner.plan(connection, chunk)
        for step in steps:
            if isinstance(step, BadLine):
                raise RegistryRefused(
                    f"{self.file.path} line {step.line}: {step.reason}, since the check: repair it in the registry, "
                    "and the same command goes on there"
                )
        at = self._ledger.now()
        written = write_steps(connection, self._vault, realm, steps, at)
        if after.devices == self.devices:
            imports.forget(connection, self._job, before)
        else:
            imports.save_place(connection, self._job, before, after, at)
        if written.device_ids:
            self._record(connection, realm, written.device_ids, steps, after)
        return steps, written.shared

    def _record(
        self, connection: Connection, realm: KnownRealm, ids: list[int], steps: list[Step], after: Place
    ) -> None:
        counts = ImportCounts()
        _count(counts, steps, SharedKeys())
        detail = {
            "file": self.file.path.name,
            "digest": self._job.digest,
            "format": self._format.name,
            "through_line": after.last_line,
            "added": counts.added,
            "updated": counts.updated,
        }
        *others, (first_id, last_id) = _ranges(ids)
        entry = Entry("device", first_id, last_id, "import-devices", realm.name, detail)
        self._ledger.record(connection, entry, others)


class _Seen:
    """Names and identities that a file had so far, by 8 bytes each: among millions, two that differ are never taken for one."""

    def __init__(self) -> None:
        self._both: set[int] = set()
        self._names: set[int] = set()
        self._identities: set[int] = set()

    def fault(self, device: FileDevice) -> BadLine | None:
        """Whether something of the device stood in the file before; what did not is remembered."""
        name = device.credentials[0].identity if device.name is None else device.name
        name_digest = _digest_8(name)
        if name_digest in self._both or name_digest in self._names:
            return BadLine(
                device.line, f"device {name!r} is in the file already: lines of one device follow each other"
            )
        digests = {
            name_digest if each.identity == name else _digest_8(each.identity): each.identity
            for each in device.credentials
        }
        for digest, identity in digests.items():
            if digest in self._both or digest in self._identities:
                return BadLine(device.line, f"identity {identity!r} is in the file already")
        if len(digests) < len(device.credentials):
            return BadLine(device.line, f"device {name!r} has an identity twice")
        if name_digest in digests:  # nearly always the one entry that a device takes
            self._both.add(name_digest)
            del digests[name_digest]
        else:
            self._names.add(name_digest)
        self._identities.update(digests)
        return None


def _digest_8(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _digest_of(options: ImportOptions) -> str:
    said = msgspec.json.encode(
        [
            options.format,
            options.key_encoding,
            options.on_conflict,
            options.group,
            sorted(options.labels.items()),
        ]
    )
    return hashlib.sha256(said).hexdigest()


def _finding(step: Step) -> Finding:
    if isinstance(step, BadLine):
        return Finding(step.line, "bad", step.reason)
    line = step.device.line
    if isinstance(step, Update):
        return Finding(line, "update", f"{step.name}: {', '.join(sorted(step.changes))}")
    return Finding(line, _VERDICTS[type(step)], step.name)


_VERDICTS: Final[dict[type, Verdict]] = {Add: "add", Same: "same", Skip: "skip"}


def _count(counts: ImportCounts, steps: Iterable[Step], shared: SharedKeys) -> None:
    for step in steps:
        if isinstance(step, Add):
            counts.added += 1
        elif isinstance(step, Update):
            counts.updated += 1
        elif isinstance(step, Skip):
            counts.skipped += 1
        else:
            counts.unchanged += 1
    counts.shared.add(shared)


def _ranges(ids: list[int]) -> list[tuple[int, int]]:
    """Ranges that have all of these ascending ids, and between two of them no gap that is not worth a range."""
    ranges = [(ids[0], ids[0])]
    for id_ in ids[1:]:
        first, last = ranges[-1]
        if id_ - last <= _GAP_MAX:
            ranges[-1] = (first, id_)
        else:
            ranges.append((id_, id_))
    return ranges
