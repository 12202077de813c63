"""A registry with the fleet of the benchmarks, kept under bench/build so that the next run finds it.

The rows are written as the registry's own code writes them (its tables, sealed keys, fingerprints, one change and
one audit row per chunk as for an import), in chunks of many devices instead of one transaction per device.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, insert

from bench import fleet
from gateway.registry import schema
from gateway.registry.database import make_engine, read, write
from gateway.registry.founding import initialise, open_secrets
from gateway.registry.ledger import Author, Entry, Ledger, utc_now
from gateway.registry.migrate import migrate
from gateway.registry.sealing import Key, MasterKey, Sealer, credential_context, fingerprint
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import Registry

REALM = "bench"
HINT = "bench"
"""Mosquitto cannot do without a hint, so the gateway sends one too."""

_CHUNK_DEVICES = 10_000
_AUTHOR = Author("bench", "bench")


@dataclass(frozen=True, slots=True)
class Node:
    """What a gateway keeps between runs: registry, master key, and the data folder with the replica."""

    folder: Path
    devices: int

    @property
    def registry_url(self) -> str:
        return f"sqlite:///{self.folder / 'registry.db'}"

    @property
    def master_key_file(self) -> Path:
        return self.folder / "master.key"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"


def prepare_node(cache: Path, devices: int, progress: Callable[[int], None]) -> Node:
    """The node with so many devices: from the cache, or built there. `progress` is told how many devices it has."""
    folder = cache / f"node-{devices}-{schema.SCHEMA_REVISION}"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, mode=0o700)
        _build(Node(unfinished, devices), progress)
        unfinished.rename(folder)
    progress(devices)
    return Node(folder, devices)


def _build(node: Node, progress: Callable[[int], None]) -> None:
    settings = RegistrySettings(url=node.registry_url, master_key_file=node.master_key_file)
    MasterKey.generate().write(node.master_key_file)
    migrate(settings.url)
    initialise(settings, _AUTHOR)
    with Registry(settings, _AUTHOR) as registry:
        realm_id = registry.add_realm(REALM, hint=HINT).id
    _Writer(settings, realm_id).write(node.devices, progress)


class _Writer:
    """Writes devices in chunks."""

    def __init__(self, settings: RegistrySettings, realm_id: int) -> None:
        self._engine = make_engine(settings.url)
        self._realm_id = realm_id
        self._sealer = Sealer([MasterKey.from_file(settings.master_key_file)])
        with read(self._engine) as connection:
            secrets = open_secrets(connection, self._sealer, str(settings.master_key_file))
        self._fingerprint_secret = secrets["fingerprint"]
        self._ledger = Ledger(_AUTHOR, utc_now, secrets["audit"])

    def write(self, devices: int, progress: Callable[[int], None]) -> None:
        try:
            for first in range(0, devices, _CHUNK_DEVICES):
                numbers = range(first, min(first + _CHUNK_DEVICES, devices))
                write(self._engine, partial(self._write_chunk, numbers=numbers))
                progress(numbers.stop)
        finally:
            self._engine.dispose()

    def _write_chunk(self, connection: Connection, numbers: range) -> None:
        at = utc_now()
        connection.execute(
            insert(schema.devices),
            [
                {
                    "id": number + 1,
                    "realm_id": self._realm_id,
                    "name": fleet.identity(number),
                    "labels": "{}",
                    "networks": "[]",
                    "disabled": False,
                    "created_at": at,
                }
                for number in numbers
            ],
        )
        connection.execute(
            insert(schema.credentials),
            [self._credential(number, fleet.identity(number)) | {"created_at": at} for number in numbers],
        )
        entry = Entry(
            "device", numbers.start + 1, numbers.stop, "import-devices", REALM, {"count": len(numbers)}
        )
        self._ledger.record(connection, entry)

    def _credential(self, number: int, identity: str) -> dict[str, object]:
        key = Key(fleet.key(identity))
        return {
            "device_id": number + 1,
            "realm_id": self._realm_id,
            "identity": identity,
            "sealed_key": self._sealer.seal(
                key.reveal(), credential_context(self._realm_id, identity.encode())
            ),
            "fingerprint": fingerprint(self._fingerprint_secret, key),
            "hash": "sha256",
        }
