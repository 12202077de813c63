"""Writing the registry, and reading it as an operator does.

A write is one transaction: the rows themselves first, then the one row of `feed` (it is held to the commit, so it comes
after every other lock), then a row of `changes` and one of `audit` under the sequence that it gave, see `ledger`. What
is refused raises `RegistryRefused` with one line, and nothing is written.

The writes themselves are in `realms`, `devices`, `credentials` and `resealing`: functions of a connection that is in a
transaction, of the ledger that records them, and of the vault that seals keys.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection, Engine

from gateway.registry import audit, credentials, devices, identities, realms, usage
from gateway.registry.audit import AuditFilter, AuditReport, AuditRow, Head
from gateway.registry.commands import WaitingCommand, cancel_command, waiting_commands
from gateway.registry.credentials import NewCredential, RotatedKey
from gateway.registry.database import make_engine, read, write
from gateway.registry.devices import AddedDevice, DeviceChanges, NewDevice, unknown_device
from gateway.registry.exporting import Exporter, ExportOptions
from gateway.registry.founding import open_secrets
from gateway.registry.importing import Importer, ImportOptions
from gateway.registry.ledger import Author, Entry, Ledger, utc_now
from gateway.registry.listing import (
    Device,
    DeviceFilter,
    Realm,
    device_named,
    devices_page,
    realm_named,
    realms_by_name,
)
from gateway.registry.migrate import check_schema
from gateway.registry.realms import AddedRealm, NewRealm, RealmChanges, known_realm
from gateway.registry.resealing import ResealProgress, reseal
from gateway.registry.sealing import Sealer
from gateway.registry.settings import RegistrySettings
from gateway.registry.vault import Vault

__all__ = ["AddedDevice", "NewCredential", "NewDevice", "NewRealm", "Registry"]

T = TypeVar("T")

PAGE_DEVICES = 1_000
"""How many devices one call lists at most."""


class Registry:
    """The registry, open for commands. One thread at a time.

    Every method raises `RegistryUnavailable` when the database is away and `RegistryMismatch` when it does not fit.
    """

    def __init__(
        self,
        settings: RegistrySettings,
        author: Author,
        *,
        now: Callable[[], dt.datetime] = utc_now,
        sealer: Sealer | None = None,
    ) -> None:
        """Without a `sealer` the master keys are read where the settings say."""
        self._settings = settings
        self._sealer = sealer
        self._author = author
        self._now = now
        self._engine: Engine | None = None
        self._ledger: Ledger | None = None
        self._vault: Vault | None = None

    def open(self) -> None:
        """Connect; see that the schema is known and that the master key opens the registry.

        Raises:
            ConfigurationError: the master key is missing or unfit.

        """
        sealer, place = self._sealer, "this gateway"
        if sealer is None:
            source = self._settings.master_keys()
            sealer, place = source.sealer(), source.place
        engine = make_engine(self._settings.url)
        try:
            check_schema(engine)
            with read(engine) as connection:
                secrets = open_secrets(connection, sealer, place)
        except BaseException:
            engine.dispose()
            raise
        self._engine = engine
        self._vault = Vault(sealer, secrets["fingerprint"])
        self._ledger = Ledger(self._author, self._now, secrets["audit"])

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def audit_key_log(self, target: str, realm: str | None, until: dt.datetime) -> None:
        """Write down that the session keys of a device, or of whoever has an address, are written to a file until then."""
        entry = Entry(
            "device",
            0,
            0,
            "write-key-log",
            f"{realm or '*'}/{target}",
            {"until": until.isoformat(timespec="seconds")},
        )  # device 0 is none: nobody has to read anything again
        self._write(lambda connection: self._books.record(connection, entry))

    # Realms

    def add_realm(self, name: str, *, hint: str | None = None, record_bytes_max: int | None = None) -> Realm:
        """Add a realm of stored keys, see `found_realm`."""
        self.found_realm(NewRealm(name=name, hint=hint, record_bytes_max=record_bytes_max))
        return self.realm(name)

    def found_realm(self, new: NewRealm) -> AddedRealm:
        """Add a realm.

        Raises:
            RegistryRefused: a value is invalid, or the name is taken.

        """
        return self._write(lambda connection: realms.add_realm(connection, self._books, self._keys, new))

    def update_realm(self, name: str, changes: RealmChanges) -> bool:
        """Change a realm; running gateways follow at once.

        Returns:
            Whether that changed anything.

        Raises:
            RegistryRefused: there is no such realm, or a value is invalid.

        """
        return self._write(lambda connection: realms.update_realm(connection, self._books, name, changes))

    def remove_realm(self, name: str, *, with_devices: bool = False) -> int:
        """Remove a realm; how many devices went with it.

        Raises:
            RegistryRefused: there is no such realm, or it has devices and they were not to go.

        """
        return self._write(
            lambda connection: realms.remove_realm(connection, self._books, name, with_devices=with_devices)
        )

    def realms(self) -> list[Realm]:
        """Every realm, by name."""
        with read(self._opened()) as connection:
            return realms_by_name(connection)

    def realm(self, name: str) -> Realm:
        """One realm. Raises RegistryRefused when there is none of this name."""
        with read(self._opened()) as connection:
            known_realm(connection, name)
            return realm_named(connection, name)

    # Devices

    def add_device(self, new: NewDevice) -> AddedDevice:
        """Add a device with its first credential.

        Raises:
            RegistryRefused: a value is invalid, the realm unknown, the identity or the device's name taken.

        """
        return self._write(lambda connection: devices.add_device(connection, self._books, self._keys, new))

    def enrol_device(self, realm_id: int, identity: str, address: str) -> AddedDevice | None:
        """Add a device that proved the key which its realm derives for it; None when it is there already.

        Raises:
            RegistryRefused: the realm enrols nobody, or the device was removed.

        """
        return self._write(
            lambda connection: devices.enrol_device(
                connection, self._books, self._keys, realm_id, identity, address
            )
        )

    def update_device(self, realm: str, name: str, changes: DeviceChanges) -> bool:
        """Change group, labels or networks of a device, or the window of a credential.

        Returns:
            Whether that changed anything.

        Raises:
            RegistryRefused: there is no such device or identity, or a value is invalid.

        """
        return self._write(
            lambda connection: devices.update_device(connection, self._books, realm, name, changes)
        )

    def set_device_enabled(self, realm: str, name: str, *, enabled: bool) -> bool:
        """Let a device connect, or not: its sessions end, its credentials stay.

        Returns:
            Whether that changed anything; when it was so already, nothing is written.

        Raises:
            RegistryRefused: there is no such device.

        """
        return self._write(
            lambda connection: devices.set_device_enabled(
                connection, self._books, realm, name, enabled=enabled
            )
        )

    def remove_device(self, realm: str, name: str) -> None:
        """Remove a device and its credentials.

        Raises:
            RegistryRefused: there is no such device.

        """
        self._write(lambda connection: devices.remove_device(connection, self._books, realm, name))

    def queue_command(
        self, realm: str, name: str, command_id: str, payload: bytes, ttl: dt.timedelta
    ) -> dt.datetime:
        """Let a command wait until the device connects, to any node, or until `ttl` has passed.

        Returns:
            When it expires.

        Raises:
            RegistryRefused: there is no such device, or see `commands.add_command`.

        """
        return self._write(
            lambda connection: devices.queue_command(
                connection, self._books, realm, name, command_id, payload, ttl
            )
        )

    def waiting_commands(
        self, *, realm: str | None = None, device: str | None = None, limit: int
    ) -> list[WaitingCommand]:
        """Commands that wait for their device, the oldest first.

        Args:
            realm: only of this one.
            device: only for devices of this name.
            limit: how many at most.

        Raises:
            RegistryRefused: there is no such realm.

        """
        with read(self._opened()) as connection:
            if realm is not None:
                known_realm(connection, realm)
            return waiting_commands(connection, self._books.now(), realm=realm, device=device, limit=limit)

    def cancel_command(self, command_id: str) -> None:
        """Let a command wait no longer.

        Raises:
            RegistryRefused: none with this id waits.

        """
        self._write(lambda connection: cancel_command(connection, self._books, command_id))

    def devices(
        self, wanted: DeviceFilter | None = None, *, limit: int = PAGE_DEVICES, after: int = 0
    ) -> list[Device]:
        """A page of devices in the order they were added.

        Args:
            wanted: which ones; all by default.
            limit: how many at most, 1 to 1000.
            after: the `id` of the last device of the page before.

        Raises:
            RegistryRefused: the realm to filter by is unknown, or a group or label could not be one.

        """
        wanted = (wanted or DeviceFilter()).checked()
        with read(self._opened()) as connection:
            if wanted.realm is not None:
                known_realm(connection, wanted.realm)
            return devices_page(connection, wanted, limit=min(max(limit, 1), PAGE_DEVICES), after=after)

    def device(self, realm: str, name: str) -> Device:
        """One device.

        Raises:
            RegistryRefused: there is no such device.

        """
        with read(self._opened()) as connection:
            known_realm(connection, realm)
            device = device_named(connection, realm, identities.parse_device_name(name))
        if device is None:
            raise unknown_device(realm, name)
        return device

    # Files of devices

    def importer(self, path: Path, options: ImportOptions) -> Importer:
        """An import of a file, to be opened.

        Raises:
            RegistryRefused: the file cannot be read.

        """
        return Importer(self._opened(), self._books, self._keys, path, options)

    def exporter(self, options: ExportOptions) -> Exporter:
        """An export to a file."""
        return Exporter(self._opened(), self._books, self._keys, options)

    # Credentials

    def rotate_key(self, realm: str, name: str, new: NewCredential) -> RotatedKey:
        """Add a credential beside those that a device has, and let these run out after the grace time.

        Raises:
            RegistryRefused: there is no such device, a value is invalid, or the identity is taken.

        """

        def work(connection: Connection) -> RotatedKey:
            device = devices.known_device(connection, realm, name)
            return credentials.rotate_key(connection, self._books, self._keys, device, name, new)

        return self._write(work)

    def revoke_key(self, realm: str, identity: str) -> str | None:
        """Refuse a credential from now on and end its sessions; the device's name, None when it was revoked before.

        Raises:
            RegistryRefused: there is no such identity.

        """
        return self._write(
            lambda connection: credentials.revoke_key(connection, self._books, realm, identity)
        )

    def begin_service_day(self) -> bool:
        """Count today as a day of service, see `usage`; whether it was not counted yet."""
        return self._write(lambda connection: usage.begin_service_day(connection, self._now()))

    def record_uses(self, uses: Mapping[int, dt.datetime]) -> int:
        """Write the last use of credentials, by id, see `usage`; how many were not used today before."""
        return self._write(lambda connection: usage.record_uses(connection, uses, self._now()))

    def reseal(self) -> Iterator[ResealProgress]:
        """Seal everything under the first master key, a piece at a time; each step is committed."""
        return reseal(self._opened(), self._books, self._keys.sealer)

    # The audit

    def audit_rows(
        self, wanted: AuditFilter | None = None, *, after: int = 0, newest: int | None = None
    ) -> Iterator[AuditRow]:
        """Rows of the audit, oldest first, see `audit.audit_rows`."""
        with read(self._opened()) as connection:
            yield from audit.audit_rows(connection, wanted or AuditFilter(), after=after, newest=newest)

    def audit_head(self) -> Head | None:
        """The newest row of the audit with its link."""
        with read(self._opened()) as connection:
            return audit.head(connection)

    def verify_audit(self, held: Head | None = None) -> AuditReport:
        """Go through the whole audit, see `audit.verify`."""
        with read(self._opened()) as connection:
            return audit.verify(connection, self._books.audit_secret, held)

    # Inside

    def _opened(self) -> Engine:
        assert self._engine is not None, "the registry is not open"
        return self._engine

    @property
    def _books(self) -> Ledger:
        assert self._ledger is not None, "the registry is not open"
        return self._ledger

    @property
    def _keys(self) -> Vault:
        assert self._vault is not None, "the registry is not open"
        return self._vault

    def _write(self, work: Callable[[Connection], T]) -> T:
        return write(self._opened(), work)
