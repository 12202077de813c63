"""Looking into a replica from another process, as workers do: LMDB opens a file once per process."""

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gateway.errors import RegistryMismatch
from gateway.registry.records import CredentialRecord
from gateway.registry.replica import ReplicaReader, ReplicaWriter


class View(msgspec.Struct):
    """What a worker sees."""

    sequence: int
    realms: dict[str, str | None]
    credentials: dict[str, CredentialRecord]
    """Of the identities that were asked for, those that are there."""


def look(generation: str, identities: Sequence[str], realm_id: int = 1) -> View:
    with ReplicaReader.open(Path(generation)) as reader:
        meta = reader.meta()
        assert meta is not None
        found = {identity: reader.credential(realm_id, identity.encode()) for identity in identities}
        return View(
            sequence=meta.sequence,
            realms={realm.name: realm.hint for realm in reader.realms()},
            credentials={identity: record for identity, record in found.items() if record is not None},
        )


def look_until(generation: str, sequence: int, identity: str) -> tuple[int, int]:
    """Look one identity up until the replica is at `sequence`; how often, and how often it was not found."""
    looked = missed = 0
    deadline = time.monotonic() + 30
    with ReplicaReader.open(Path(generation)) as reader:
        while time.monotonic() < deadline:
            looked += 1
            missed += reader.credential(1, identity.encode()) is None
            meta = reader.meta()
            if meta is not None and meta.sequence >= sequence:
                return looked, missed
    raise TimeoutError


def open_result(generation: str) -> str:
    """What becomes of opening a generation that may be damaged; it may cost this process its life."""
    try:
        writer = ReplicaWriter.open(Path(generation))
        meta = writer.meta()
        writer.close()
    except RegistryMismatch as exc:
        return str(exc)
    return "no meta" if meta is None else "good"


def hold_a_place(generation: str) -> None:
    """Be a worker, until killed."""
    reader = ReplicaReader.open(Path(generation))
    reader.credential(1, b"m-0")
    print("reading", flush=True)
    time.sleep(60)


def time_lookups(generation: str, identities: Sequence[str]) -> float:
    """CPU seconds per look-up."""
    with ReplicaReader.open(Path(generation)) as reader:
        encoded = [identity.encode() for identity in identities]
        started = time.process_time()
        for identity in encoded:
            assert reader.credential(1, identity) is not None
        return (time.process_time() - started) / len(encoded)
