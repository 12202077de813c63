"""Writing the registry, and reading it as an operator does.

A write is one transaction: the rows themselves first, then the one row of `feed` (it is held to the commit, so it comes
after every other lock), then a row of `changes` and one of `audit` under the sequence that it gave, see `ledger`. What
is refused raises `RegistryRefused` with one line, and nothing is written.
"""

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from gateway.errors import RegistryRefused
from gateway.registry import commands, identities, schema
from gateway.registry.database import make_engine, read, write
from gateway.registry.founding import open_secrets
from gateway.registry.ledger import Author, Entry, record_change, utc_now
from gateway.registry.listing import Device, DeviceFilter, Realm, device_named, devices_page, realms_by_name
from gateway.registry.migrate import check_schema
from gateway.registry.records import PskHash
from gateway.registry.sealing import Key, MasterKey, Sealer, credential_context, fingerprint
from gateway.registry.settings import RegistrySettings

__all__ = ["AddedDevice", "NewDevice", "Registry"]

PAGE_DEVICES = 1_000
"""How many devices one call lists at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDevice:
    """What `Registry.add_device` is asked for: texts as people write them, checked there.

    The device gets the name `identity` and one credential. Without a `key` a random one of 32 bytes is made.
    """

    identity: str
    realm: str = "default"
    group: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    key: Key | None = None
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None
    networks: Iterable[str] = ()
    hash: PskHash = "sha256"


@dataclass(frozen=True, slots=True)
class AddedDevice:
    """A device as it was added, with its key: the only time that it is shown."""

    realm: str
    device: str
    identity: str
    key: Key
    hint: str | None
    group: str | None
    labels: dict[str, str]
    sequence: int


class Registry:
    """The registry, open for commands. One thread at a time.

    Every method raises `RegistryUnavailable` when the database is away and `RegistryMismatch` when it does not fit.
    """

    def __init__(
        self, settings: RegistrySettings, author: Author, *, now: Callable[[], dt.datetime] = utc_now
    ) -> None:
        self._settings = settings
        self._author = author
        self._now = now
        self._engine: Engine | None = None
        self._sealer: Sealer | None = None
        self._fingerprint_secret = b""

    def open(self) -> None:
        """Connect; see that the schema is known and that the master key opens the registry.

        Raises:
            ConfigurationError: the master key file is missing or unfit.

        """
        sealer = Sealer([MasterKey.from_file(self._settings.master_key_file)])
        engine = make_engine(self._settings.url)
        try:
            check_schema(engine)
            with read(engine) as connection:
                secrets = open_secrets(connection, sealer, self._settings.master_key_file)
        except BaseException:
            engine.dispose()
            raise
        self._engine, self._sealer = engine, sealer
        self._fingerprint_secret = secrets["fingerprint"]

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

    # Writes

    def add_realm(self, name: str, *, hint: str | None = None, record_bytes_max: int | None = None) -> Realm:
        """Add a realm.

        Args:
            name: 1 to 64 characters.
            hint: the TLS 1.2 identity hint, 1 to 128 bytes.
            record_bytes_max: most plaintext bytes of a record to its devices, 64 to 16384.

        Raises:
            RegistryRefused: a value is invalid, or the name is taken.

        """
        name = identities.parse_realm_name(name)
        hint = None if hint is None else identities.parse_hint(hint)
        if record_bytes_max is not None:
            identities.check_record_bytes(record_bytes_max)

        def work(connection: Connection) -> Realm:
            if _find_realm(connection, name) is not None:
                raise RegistryRefused(f"realm {name!r} is there already")
            created_at = self._now()
            try:
                result = connection.execute(
                    insert(schema.realms).values(
                        name=name, hint=hint, created_at=created_at, record_bytes_max=record_bytes_max
                    )
                )
            except IntegrityError as exc:
                raise RegistryRefused(f"realm {name!r} is there already") from exc
            realm_id = _new_id(result.inserted_primary_key)
            detail = {"hint": hint, "record_bytes_max": record_bytes_max}
            self._record(connection, Entry("realm", realm_id, realm_id, "add-realm", name, detail))
            return Realm(realm_id, name, hint, created_at, record_bytes_max)

        return write(self._opened(), work)

    def add_device(self, new: NewDevice) -> AddedDevice:
        """Add a device with its first credential.

        Raises:
            RegistryRefused: a value is invalid, the realm unknown, the identity or the device's name taken.

        """
        draft = _checked(new)
        return write(self._opened(), lambda connection: self._insert_device(connection, draft))

    def _insert_device(self, connection: Connection, draft: "_Draft") -> AddedDevice:
        realm = _known_realm(connection, draft.realm)
        _check_free(connection, realm.id, draft)
        created_at = self._now()
        try:
            device = connection.execute(
                insert(schema.devices).values(
                    realm_id=realm.id,
                    name=draft.identity,
                    group_name=draft.group,
                    labels=msgspec.json.encode(draft.labels).decode(),
                    networks=msgspec.json.encode(draft.networks).decode(),
                    disabled=False,
                    created_at=created_at,
                )
            )
            device_id = _new_id(device.inserted_primary_key)
            connection.execute(
                insert(schema.credentials).values(
                    device_id=device_id,
                    realm_id=realm.id,
                    identity=draft.identity,
                    sealed_key=self._seal(realm.id, draft.identity, draft.key),
                    fingerprint=fingerprint(self._fingerprint_secret, draft.key),
                    hash=draft.hash,
                    not_before=draft.not_before,
                    not_after=draft.not_after,
                    created_at=created_at,
                )
            )
        except IntegrityError as exc:  # somebody else added it between our look and our insert
            raise RegistryRefused(f"{draft.identity!r} is taken in realm {draft.realm!r}") from exc
        subject = f"{draft.realm}/{draft.identity}"
        sequence = self._record(
            connection, Entry("device", device_id, device_id, "add-device", subject, draft.audited())
        )
        return AddedDevice(
            draft.realm,
            draft.identity,
            draft.identity,
            draft.key,
            realm.hint,
            draft.group,
            draft.labels,
            sequence,
        )

    def set_device_enabled(self, realm: str, name: str, *, enabled: bool) -> bool:
        """Let a device connect, or not: its sessions end, its credentials stay.

        Returns:
            Whether that changed anything; when it was so already, nothing is written.

        Raises:
            RegistryRefused: there is no such device.

        """

        def work(connection: Connection) -> bool:
            device = _known_device(connection, realm, name)
            if device.disabled == (not enabled):
                return False
            connection.execute(
                update(schema.devices).where(schema.devices.c.id == device.id).values(disabled=not enabled)
            )
            action = "enable-device" if enabled else "disable-device"
            self._record(connection, Entry("device", device.id, device.id, action, f"{realm}/{name}"))
            return True

        return write(self._opened(), work)

    def remove_device(self, realm: str, name: str) -> None:
        """Remove a device and its credentials.

        Raises:
            RegistryRefused: there is no such device.

        """

        def work(connection: Connection) -> None:
            device = _known_device(connection, realm, name)
            credentials = schema.credentials
            identities_ = connection.scalars(
                select(credentials.c.identity).where(credentials.c.device_id == device.id)
            ).all()
            connection.execute(delete(credentials).where(credentials.c.device_id == device.id))
            connection.execute(delete(schema.devices).where(schema.devices.c.id == device.id))
            detail = {"identities": list(identities_)}
            self._record(
                connection, Entry("device", device.id, device.id, "remove-device", f"{realm}/{name}", detail)
            )

        write(self._opened(), work)

    def queue_command(
        self, realm: str, name: str, command_id: str, payload: bytes, ttl: dt.timedelta
    ) -> dt.datetime:
        """Let a command wait until the device connects, to any node, or until `ttl` has passed.

        Returns:
            When it expires.

        Raises:
            RegistryRefused: there is no such device, or see `commands.add_command`.

        """

        def work(connection: Connection) -> dt.datetime:
            device = _known_device(connection, realm, name)
            created_at = self._now()
            expires_at = created_at + ttl
            commands.add_command(
                connection,
                device_id=device.id,
                command_id=command_id,
                payload=payload,
                created_at=created_at,
                expires_at=expires_at,
            )
            detail = {"command": command_id, "bytes": len(payload), "expires_at": expires_at}
            self._record(
                connection, Entry("device", device.id, device.id, "queue-command", f"{realm}/{name}", detail)
            )
            return expires_at

        return write(self._opened(), work)

    # Reads

    def realms(self) -> list[Realm]:
        """Every realm, by name."""
        with read(self._opened()) as connection:
            return realms_by_name(connection)

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
        wanted = _checked_filter(wanted or DeviceFilter())
        with read(self._opened()) as connection:
            if wanted.realm is not None:
                _known_realm(connection, wanted.realm)
            return devices_page(connection, wanted, limit=min(max(limit, 1), PAGE_DEVICES), after=after)

    def device(self, realm: str, name: str) -> Device:
        """One device.

        Raises:
            RegistryRefused: there is no such device.

        """
        with read(self._opened()) as connection:
            _known_realm(connection, realm)
            device = device_named(connection, realm, identities.parse_device_name(name))
        if device is None:
            raise _unknown_device(realm, name)
        return device

    # Inside

    def _opened(self) -> Engine:
        assert self._engine is not None, "the registry is not open"
        return self._engine

    def _record(self, connection: Connection, entry: Entry) -> int:
        return record_change(connection, entry, self._author, self._now)

    def _seal(self, realm_id: int, identity: str, key: Key) -> bytes:
        assert self._sealer is not None, "the registry is not open"
        return self._sealer.seal(key.reveal(), credential_context(realm_id, identity.encode()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A new device whose every value was checked."""

    realm: str
    identity: str
    group: str | None
    labels: dict[str, str]
    key: Key
    not_before: dt.datetime | None
    not_after: dt.datetime | None
    networks: tuple[str, ...]
    hash: PskHash

    def audited(self) -> dict[str, Any]:
        """What the audit says of it: what differs from the defaults, and never the key."""
        detail = {
            "identity": self.identity,
            "group": self.group,
            "labels": self.labels,
            "not_before": self.not_before,
            "not_after": self.not_after,
            "networks": self.networks,
            "hash": self.hash,
        }
        return {name: value for name, value in detail.items() if value}


def _checked(new: NewDevice) -> _Draft:
    not_before, not_after = new.not_before, new.not_after
    if not_before is not None and not_after is not None and not_before >= not_after:
        raise RegistryRefused("not-before must be earlier than not-after")
    return _Draft(
        realm=new.realm,
        identity=identities.parse_identity(new.identity),
        group=None if new.group is None else identities.parse_group(new.group),
        labels=identities.parse_labels(new.labels),
        key=Key.generate() if new.key is None else identities.check_key(new.key),
        not_before=not_before,
        not_after=not_after,
        networks=identities.parse_networks(new.networks),
        hash=new.hash,
    )


def _checked_filter(wanted: DeviceFilter) -> DeviceFilter:
    return DeviceFilter(
        realm=wanted.realm,
        group=None if wanted.group is None else identities.parse_group(wanted.group),
        labels=identities.parse_labels(wanted.labels),
    )


def _check_free(connection: Connection, realm_id: int, draft: _Draft) -> None:
    devices, credentials = schema.devices.c, schema.credentials.c
    identity = draft.identity
    taken = select(credentials.id).where(credentials.realm_id == realm_id, credentials.identity == identity)
    if connection.execute(taken).first() is not None:
        raise RegistryRefused(f"identity {identity!r} is taken in realm {draft.realm!r}")
    taken = select(devices.id).where(devices.realm_id == realm_id, devices.name == identity)
    if connection.execute(taken).first() is not None:
        raise RegistryRefused(f"device {identity!r} is there already in realm {draft.realm!r}")


class _KnownRealm(NamedTuple):
    id: int
    hint: str | None


class _KnownDevice(NamedTuple):
    id: int
    disabled: bool


def _find_realm(connection: Connection, name: str) -> _KnownRealm | None:
    realms = schema.realms.c
    row = connection.execute(select(realms.id, realms.hint).where(realms.name == name)).first()
    return None if row is None else _KnownRealm(*row)


def _known_realm(connection: Connection, name: str) -> _KnownRealm:
    realm = _find_realm(connection, identities.parse_realm_name(name))
    if realm is None:
        raise RegistryRefused(f"realm {name!r} does not exist: `gatewayctl list-realms` shows those that do")
    return realm


def _known_device(connection: Connection, realm: str, name: str) -> _KnownDevice:
    """The device, locked until the end of the transaction where the database locks rows."""
    devices = schema.devices.c
    name = identities.parse_device_name(name)
    realm_id = _known_realm(connection, realm).id
    query = select(devices.id, devices.disabled).where(devices.realm_id == realm_id, devices.name == name)
    row = connection.execute(query.with_for_update()).first()
    if row is None:
        raise _unknown_device(realm, name)
    return _KnownDevice(*row)


def _unknown_device(realm: str, name: str) -> RegistryRefused:
    return RegistryRefused(
        f"device {name!r} does not exist in realm {realm!r}: `gatewayctl list-devices` shows all"
    )


def _new_id(primary_key: Sequence[Any] | None) -> int:
    assert primary_key is not None, "every table here numbers its rows itself"
    return int(primary_key[0])
