"""Exporting devices into a file, with their keys when that is asked for by name.

Devices come in the order they were added. What a format cannot say is counted. A device that would be let in by the
file's reader, and is refused here, is left out of it: one that is disabled where the format does not know that, a
credential that is revoked, or not valid now. So are identities and keys that cannot be written.
"""

import contextlib
import datetime as dt
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from msgspec.structs import replace
from sqlalchemy import Connection, Engine, select

from gateway.errors import ConfigurationError, RegistryRefused
from gateway.files import sync_folder
from gateway.registry import schema
from gateway.registry.database import read, write
from gateway.registry.formats import FORMATS
from gateway.registry.formats.base import Feature, FileCredential, FileDevice, Format
from gateway.registry.formats.keys import KeyEncoding, can_encode_key
from gateway.registry.ledger import Entry, Ledger
from gateway.registry.listing import DeviceFilter, devices_page
from gateway.registry.realms import KnownRealm, known_realm
from gateway.registry.sealing import Key, credential_context
from gateway.registry.vault import Vault

__all__ = ["ExportCounts", "ExportOptions", "Exporter"]

_PAGE_DEVICES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to write, and how."""

    format: str
    realm: str = "default"
    key_encoding: KeyEncoding | None = None
    """None: as the format has it."""
    with_keys: bool = False
    group: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class ExportCounts:
    """What was written so far, and what was not."""

    devices: int = 0
    credentials: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Credentials (and devices that have none), by why."""
    unsaid: Counter[Feature] = field(default_factory=Counter)
    """Devices in the file about which it does not say something, by what."""


class Exporter:
    """One export; `write` does it."""

    def __init__(self, engine: Engine, ledger: Ledger, vault: Vault, options: ExportOptions) -> None:
        self._engine = engine
        self._ledger = ledger
        self._vault = vault
        self._options = options
        self._format: Format = FORMATS[options.format]
        self._encoding: KeyEncoding = options.key_encoding or self._format.key_encoding
        self._now = ledger.now()

    def write(self, path: Path) -> Iterator[ExportCounts]:
        """Write the file, 0600 and whole or not at all; the counts after each page, always the same object.

        Raises:
            RegistryRefused: an unknown realm, or a format that is nothing without keys.
            ConfigurationError: the file cannot be written.

        """
        options = self._options
        if self._format.needs_keys and not options.with_keys:
            raise RegistryRefused(
                f"a file of {self._format.name} is made of keys: give --with-keys to export them"
            )
        if options.with_keys:
            write(self._engine, self._record)
        counts = ExportCounts()
        with _private_file(path) as file, read(self._engine) as connection:
            realm = known_realm(connection, options.realm)
            file.write(self._format.begin(with_keys=options.with_keys))
            for page in self._pages(connection, realm):
                for device in page:
                    text = self._text(device, counts)
                    if text:
                        file.write((self._format.separator if counts.devices else "") + text)
                        counts.devices += 1
                yield counts
            file.write(self._format.end())

    def _record(self, connection: Connection) -> None:
        """Whoever takes keys out stands in the audit."""
        realm = known_realm(connection, self._options.realm)
        detail = {"format": self._format.name, "group": self._options.group, "labels": self._options.labels}
        shown = {name: value for name, value in detail.items() if value}
        self._ledger.record(connection, Entry("realm", 0, 0, "export-keys", realm.name, shown))

    # Reading

    def _pages(self, connection: Connection, realm: KnownRealm) -> Iterator[list[FileDevice]]:
        wanted = DeviceFilter(
            realm=realm.name, group=self._options.group, labels=self._options.labels
        ).checked()
        after = 0
        while page := devices_page(connection, wanted, limit=_PAGE_DEVICES, after=after):
            after = page[-1].id
            keys = self._keys(connection, realm, [device.id for device in page])
            yield [
                FileDevice(
                    line=0,
                    last_line=0,
                    credentials=tuple(
                        FileCredential(
                            identity=each.identity,
                            key=keys.get(each.identity),
                            hash=each.hash,
                            not_before=each.not_before,
                            not_after=each.not_after,
                            revoked_at=each.revoked_at,
                        )
                        for each in device.credentials
                    ),
                    name=device.name,
                    group=device.group,
                    labels=device.labels,
                    networks=device.networks,
                    disabled=device.disabled,
                )
                for device in page
            ]

    def _keys(self, connection: Connection, realm: KnownRealm, device_ids: list[int]) -> dict[str, Key]:
        """The keys of these devices, by identity."""
        if not self._options.with_keys:
            return {}
        table = schema.credentials.c
        rows = connection.execute(
            select(table.identity, table.sealed_key).where(table.device_id.in_(device_ids))
        )
        return {identity: self._key(realm, identity, bytes(sealed)) for identity, sealed in rows}

    def _key(self, realm: KnownRealm, identity: str, sealed: bytes) -> Key:
        if not sealed:
            return self._vault.derive(realm.id, realm.key_source, realm.sealed_secret, identity)
        return Key(self._vault.sealer.open(sealed, credential_context(realm.id, identity.encode())))

    # Writing

    def _text(self, device: FileDevice, counts: ExportCounts) -> str:
        kept = []
        if not device.credentials:
            counts.left_out["no credential"] += 1
        for credential in device.credentials:
            why = self._why_left_out(device, credential)
            if why is None:
                kept.append(credential)
            else:
                counts.left_out[why] += 1
        if not kept:
            return ""
        counts.credentials += len(kept)
        counts.unsaid.update(self._unsaid(device, kept))
        return self._format.write(
            replace(device, credentials=tuple(kept)), self._encoding, with_keys=self._options.with_keys
        )

    def _why_left_out(self, device: FileDevice, credential: FileCredential) -> str | None:
        carries = self._format.carries
        if device.disabled and "enabled" not in carries:
            return "disabled"
        if credential.revoked_at is not None and "revoked" not in carries:
            return "revoked"
        if "window" not in carries and not _is_valid(credential, self._now):
            return "not valid now"
        if credential.key is not None and not can_encode_key(credential.key, self._encoding):
            return "a key that is no printable text"
        return self._format.unfit(credential.identity)

    def _unsaid(self, device: FileDevice, credentials: list[FileCredential]) -> set[Feature]:
        has: dict[Feature, Any] = {
            "device": any(each.identity != device.name for each in credentials),
            "group": device.group,
            "labels": device.labels,
            "networks": device.networks,
            "hash": any(each.hash != "sha256" for each in credentials),
            "window": any(each.not_before or each.not_after for each in credentials),
        }
        return {feature for feature, value in has.items() if value and feature not in self._format.carries}


def _is_valid(credential: FileCredential, now: dt.datetime) -> bool:
    begins, ends = credential.not_before, credential.not_after
    return (not isinstance(begins, dt.datetime) or begins <= now) and (
        not isinstance(ends, dt.datetime) or now < ends
    )


@contextlib.contextmanager
def _private_file(path: Path) -> Iterator[IO[str]]:
    """A new file for its owner alone, which takes the name when the block has ended well."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigurationError(f"{path} is no regular file: name one to be written")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            sync_folder(path.parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be written: {exc.strerror}") from exc
