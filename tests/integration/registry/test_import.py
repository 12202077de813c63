"""Files of devices on every database: each format out and in again, conflicts, interruptions, bad lines."""

import datetime as dt
import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, func, select

from gateway.errors import ConfigurationError, RegistryRefused
from gateway.registry import feed, importing, schema
from gateway.registry.audit import AuditFilter
from gateway.registry.exporting import ExportCounts, ExportOptions
from gateway.registry.formats import FORMATS
from gateway.registry.importing import Finding, ImportCounts, ImportOptions
from gateway.registry.ledger import Author
from gateway.registry.realms import NewRealm
from gateway.registry.sealing import Key
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry

NOON = dt.datetime(2030, 1, 2, 12, 0, 0, 123456, tzinfo=dt.UTC)  # the clock of `registry`
KEY = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
TEXT_KEY = b"a key of text: 0123456789".hex()


def device(name: str, *credentials: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"device": name, "credentials": list(credentials) or [credential(name)], **values}


def credential(identity: str, key: str | None = None, **values: Any) -> dict[str, Any]:
    """A credential with a key that nobody else has, the same every time."""
    return {"identity": identity, "key": key or (identity.encode().hex() * 32)[:62] + "00", **values}


FLEET = [
    device("meter-1", credential("meter-1", KEY)),
    device("spoken", credential("spoken", TEXT_KEY)),
    device(
        "plant/7",
        credential("seven", hash="sha384", not_before="2029-01-01T00:00:00Z"),
        credential("seven.2", not_after="2040-01-01T00:00:00.123456Z"),
        group="pumps",
        labels={"site": 'north "1"', "floor": "2, left"},
        allow_from=["10.0.0.0/8", "2001:db8::/32"],
    ),
    device("off", enabled=False),
    device("half", credential("half.1", revoked_at="2029-05-05T05:05:05Z"), credential("half.2")),
    device("over", credential("over", not_after="2029-12-31T00:00:00Z")),
    device("urn:dev:1"),
    device("#1"),
    device("Zähler, 'ß'"),
    device("space "),
]
"""Everything that some format cannot say, on the second of January 2030."""

ONLY_THESE = {
    "stunnel": {"meter-1", "spoken", "plant/7", "half", "#1", "Zähler, 'ß'", "space "},
    "mosquitto": {"meter-1", "spoken", "plant/7", "half", "Zähler, 'ß'"},
    "emqx": {"spoken"},
    "gnutls": {"meter-1", "spoken", "plant/7", "half", "urn:dev:1", "#1", "Zähler, 'ß'", "space "},
    "azure-dps": {"meter-1", "spoken", "plant/7", "off", "half", "urn:dev:1"},
}
"""Devices that a format can say something of; all of them where it is not here."""


def write_lines(path: Path, documents: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def check(registry: Registry, path: Path, **options: Any) -> list[Finding]:
    with registry.importer(path, ImportOptions(**options)) as importer:
        return list(importer.check())


def run(registry: Registry, path: Path, **options: Any) -> ImportCounts:
    with registry.importer(path, ImportOptions(**options)) as importer:
        assert [finding for finding in importer.check() if finding.verdict == "bad"] == []
        *_, counts = [ImportCounts(), *importer.write()]
        return counts


def export(registry: Registry, path: Path, **options: Any) -> ExportCounts:
    *_, counts = [ExportCounts(), *registry.exporter(ExportOptions(**options)).write(path)]
    return counts


@pytest.fixture
def fleet(registry: Registry, tmp_path: Path) -> Registry:
    """A registry with the whole of `FLEET` in the realm `default`."""
    run(registry, write_lines(tmp_path / "fleet.jsonl", FLEET), format="jsonl")
    return registry


@pytest.mark.parametrize("name", FORMATS)
def test_exported_and_imported_again_is_the_same(fleet: Registry, tmp_path: Path, name: str) -> None:
    fleet.add_realm("other")
    first, second = tmp_path / "first", tmp_path / "second"
    counts = export(fleet, first, format=name, with_keys=True)
    kept = ONLY_THESE.get(name, {each["device"] for each in FLEET})
    assert counts.devices == len(kept)
    assert run(fleet, first, format=name, realm="other").added > 0
    export(fleet, second, format=name, realm="other", with_keys=True)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 0

    wanted, found = (in_own_words(fleet, tmp_path / "words", realm) for realm in ("default", "other"))
    if FORMATS[name].carries == FORMATS["jsonl"].carries:
        assert found == wanted
        assert counts.left_out == counts.unsaid == {}
    keys = [{c["identity"]: c["key"] for d in each for c in d["credentials"]} for each in (wanted, found)]
    assert keys[1].items() <= keys[0].items()
    assert len(keys[1]) == counts.credentials


def in_own_words(registry: Registry, path: Path, realm: str) -> list[dict[str, Any]]:
    export(registry, path, format="jsonl", realm=realm, with_keys=True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_a_format_cannot_say_is_counted(fleet: Registry, tmp_path: Path) -> None:
    counts = export(fleet, tmp_path / "psk", format="mosquitto", with_keys=True)
    assert counts.left_out == {
        "disabled": 1,
        "revoked": 1,
        "not valid now": 1,
        "a colon in the identity": 1,
        "an identity that begins with #": 1,
        "an identity with white space at its end": 1,
    }
    assert counts.unsaid == {"device": 2, "group": 1, "labels": 1, "networks": 1, "hash": 1, "window": 1}
    text = (tmp_path / "psk").read_text().splitlines()
    assert text[0] == f"meter-1:{KEY}"
    assert [line.partition(":")[0] for line in text] == [
        "meter-1",
        "spoken",
        "seven",
        "seven.2",
        "half.2",
        "Zähler, 'ß'",
    ]


def test_an_export_is_private_and_keys_have_to_be_asked_for(fleet: Registry, tmp_path: Path) -> None:
    os.umask(0o022)
    path = tmp_path / "devices"
    path.write_text("somebody else's")
    path.chmod(0o644)
    with pytest.raises(RegistryRefused, match="--with-keys"):
        export(fleet, path, format="stunnel")
    assert path.read_text() == "somebody else's"
    for name in ("csv", "jsonl", "hono", "azure-dps"):
        export(fleet, path, format=name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        text = path.read_text()
        assert "meter-1" in text
        assert KEY not in text
        assert "AAECAwQF" not in text
        assert "key" not in text.casefold().replace("space", "")
    assert list(fleet.audit_rows(AuditFilter(action="export-keys"))) == []
    export(fleet, path, format="csv", with_keys=True)
    (row,) = fleet.audit_rows(AuditFilter(action="export-keys"))
    assert (row.actor, row.subject, row.details) == ("alice", "default", {"format": "csv"})
    assert {each.name for each in tmp_path.iterdir() if "devices" in each.name} == {"devices"}


def test_an_export_that_fails_leaves_nothing(fleet: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written: No such file"):
        export(fleet, tmp_path / "none" / "file", format="csv")
    with pytest.raises(ConfigurationError, match="no regular file"):
        export(fleet, tmp_path, format="csv")
    with pytest.raises(RegistryRefused, match="realm 'nowhere' does not exist"):
        export(fleet, tmp_path / "file", format="csv", realm="nowhere")
    assert not list(tmp_path.glob("*file*"))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("csv", "derived-hkdf"),
        ("jsonl", "derived-hkdf"),
        ("hono", "derived-hmac"),
        ("azure-dps", "derived-hmac"),
    ],
)
def test_identities_alone_go_into_a_realm_that_derives_its_keys(
    registry: Registry, engine: Engine, tmp_path: Path, name: str, source: Any
) -> None:
    secret = Key(bytes(range(32)))
    for realm in ("one", "other"):
        registry.found_realm(NewRealm(name=realm, key_source=source, secret=secret))
    added = registry.add_device(NewDevice(identity="m1", realm="one"))
    registry.add_device(NewDevice(identity="m2", realm="other"))
    registry.remove_device("other", "m2")
    registry.add_device(NewDevice(identity="m2", realm="one"))
    export(registry, tmp_path / "file", format=name, realm="one")
    assert run(registry, tmp_path / "file", format=name, realm="other").added == 2
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(schema.tombstones)).scalar_one() == 0
    (first, _) = in_own_words(registry, tmp_path / "words", "other")
    assert first["credentials"][0]["key"] == added.key.hex()

    export(registry, tmp_path / "file", format=name, realm="one", with_keys=True)
    findings = check(registry, tmp_path / "file", format=name, realm="other", on_conflict="update")
    assert [finding.verdict for finding in findings] == ["bad", "bad"]
    assert f"the keys of realm 'other' are derived ({source})" in findings[0].text


def test_a_file_without_keys_adds_nothing_where_keys_are_stored(fleet: Registry, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("identity,group\nmeter-1,g\nnew,g\n")
    first, second = check(fleet, path, format="csv", on_conflict="update")
    assert (first.verdict, first.text) == ("update", "meter-1: group")
    assert (second.verdict, second.line) == ("bad", 3)
    assert second.text == "identity 'new' has no key, and realm 'default' derives none"


def test_conflicts(fleet: Registry, tmp_path: Path) -> None:
    before = in_own_words(fleet, tmp_path / "words", "default")
    path = tmp_path / "file.csv"
    path.write_text(
        f"identity,device,key,group\nmeter-1,meter-1,{'ab' * 16},new\nfresh,,{'cd' * 16},\nmeter-1.2,half,{'ef' * 16},\n"
    )
    first, second, third = check(fleet, path, format="csv")
    assert (first.line, first.verdict, first.text) == (
        2,
        "bad",
        "identity 'meter-1' is taken in realm 'default'",
    )
    assert second.verdict == "add"
    assert (third.verdict, third.text) == ("bad", "device 'half' is there already in realm 'default'")

    counts = run(fleet, path, format="csv", on_conflict="skip")
    assert (counts.added, counts.skipped, counts.updated) == (1, 2, 0)
    after = in_own_words(fleet, tmp_path / "words", "default")
    assert after[:-1] == before
    assert after[-1]["device"] == "fresh"

    found = {finding.line: finding for finding in check(fleet, path, format="csv", on_conflict="update")}
    assert found[2].text == "meter-1: group, key"
    assert found[3].verdict == "same"
    assert found[4].text == "half: identity"
    counts = run(fleet, path, format="csv", on_conflict="update")
    assert (counts.added, counts.skipped, counts.updated, counts.unchanged) == (0, 0, 2, 1)
    named = {each["device"]: each for each in in_own_words(fleet, tmp_path / "words", "default")}
    assert named["meter-1"]["group"] == "new"
    assert named["meter-1"]["credentials"][0]["key"] == "ab" * 16
    assert [each["identity"] for each in named["half"]["credentials"]] == ["half.1", "half.2", "meter-1.2"]
    assert run(fleet, path, format="csv", on_conflict="update").unchanged == 3


def test_what_a_file_does_not_say_stays(fleet: Registry, tmp_path: Path) -> None:
    path = tmp_path / "psk"
    path.write_text(f"seven:{'ab' * 16}\nover:{'ab' * 16}\n")
    counts = run(fleet, path, format="mosquitto", on_conflict="update", labels={"site": "south"})
    assert counts.updated == 2
    assert counts.shared.count == 2
    named = {each["device"]: each for each in in_own_words(fleet, tmp_path / "words", "default")}
    pump = named["plant/7"]
    assert pump["labels"] == {"site": "south", "floor": "2, left"}
    assert (pump["group"], pump["allow_from"]) == ("pumps", ["10.0.0.0/8", "2001:db8::/32"])
    assert pump["credentials"][0]["key"] == "ab" * 16
    assert pump["credentials"][0]["not_before"] == "2029-01-01T00:00:00Z"
    assert named["over"]["credentials"][0]["not_after"] == "2029-12-31T00:00:00Z"


def test_an_identity_of_another_device_is_not_moved(fleet: Registry, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "file",
        [device("off", credential("seven")), device("new", credential("seven.2"))],
    )
    first, second = check(fleet, path, format="jsonl", on_conflict="update")
    assert first.text == "its name and identities belong to several devices: rename or remove one"
    assert second.text == "its identity belongs to device 'plant/7', not to 'new'"


def test_group_and_labels_for_all(registry: Registry, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "file", [device("a", group="own", labels={"x": "1"}), device("b", labels={"y": "2"})]
    )
    run(registry, path, format="jsonl", group="given", labels={"x": "9"})
    a, b = registry.devices()
    assert (a.group, a.labels) == ("own", {"x": "9"})
    assert (b.group, b.labels) == ("given", {"x": "9", "y": "2"})


@pytest.mark.parametrize("column", ["not_before", "not_after", "revoked_at"])
def test_moments_that_few_have(registry: Registry, tmp_path: Path, column: str) -> None:
    """What no row of a chunk has is not written, and a moment that follows itself is looked at once."""
    moments = [
        None,
        "2031-02-03T04:05:06Z",
        "2031-02-03T04:05:06Z",
        "2032-01-01T00:00:00Z",
        None,
        "2031-02-03T04:05:06Z",
    ]
    lines = [
        device(f"d{n}", credential(f"d{n}", **({column: at} if at else {}))) for n, at in enumerate(moments)
    ]
    run(registry, write_lines(tmp_path / "file", lines), format="jsonl")
    credentials = [each for device in registry.devices() for each in device.credentials]
    for name in ("not_before", "not_after", "revoked_at"):
        expected = (
            [at and dt.datetime.fromisoformat(at) for at in moments]
            if name == column
            else [None] * len(moments)
        )
        assert [getattr(each, name) for each in credentials] == expected
    assert [each.created_at for each in credentials] == [NOON] * len(moments)


def many(path: Path, count: int) -> Path:
    path.write_text("".join(f"dev-{number}:{number:064x}\n" for number in range(count)))
    return path


def test_an_interrupted_import_goes_on(
    registry: Registry, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_CREDENTIALS_PER_CHUNK", 10)
    path = many(tmp_path / "psk", 45)
    with engine.connect() as connection:
        start = feed.head(connection).sequence
    with registry.importer(path, ImportOptions(format="mosquitto")) as importer:
        list(importer.check())
        for counts in importer.write():
            if counts.added == 20:
                break
    path = path.rename(tmp_path / "renamed")

    other = check(registry, path, format="mosquitto", on_conflict="skip")
    assert [each.verdict for each in other].count("skip") == 20, "other options are another import"
    findings = check(registry, path, format="mosquitto")
    assert [each.verdict for each in findings] == ["done"] * 20 + ["add"] * 25
    counts = run(registry, path, format="mosquitto")
    assert (counts.done, counts.added) == (20, 25)
    assert len(registry.devices()) == 45

    rows = list(registry.audit_rows(AuditFilter(action="import-devices")))
    assert [row.details["added"] for row in rows] == [10, 10, 10, 10, 5]
    assert [row.details["through_line"] for row in rows] == [10, 20, 30, 40, 45]
    assert {row.subject for row in rows} == {"default"}
    assert registry.verify_audit().faults == []
    with engine.connect() as connection:
        changes = feed.changes_after(connection, start, 100)
        assert [change.width for change in changes] == [10, 10, 10, 10, 5]
        assert (
            len(feed.credentials_of_devices(connection, [(changes[0].first_id, changes[-1].last_id)])) == 45
        )
        assert connection.execute(select(func.count()).select_from(schema.imports)).scalar_one() == 0

    findings = check(registry, path, format="mosquitto")
    assert {each.verdict for each in findings} == {"bad"}, "a finished one begins anew"


def test_two_of_the_same_import_do_not_mix(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_CREDENTIALS_PER_CHUNK", 10)
    path = many(tmp_path / "psk", 30)
    options = ImportOptions(format="mosquitto", on_conflict="skip")
    with registry.importer(path, options) as one, registry.importer(path, options) as other:
        for each in (one, other):
            list(each.check())
        next(one.write())
        with pytest.raises(RegistryRefused, match="the same import runs elsewhere"):
            next(other.write())
    assert len(registry.devices()) == 10


def test_taken_between_check_and_writing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_CREDENTIALS_PER_CHUNK", 10)
    path = many(tmp_path / "psk", 30)
    with registry.importer(path, ImportOptions(format="mosquitto")) as importer:
        list(importer.check())
        registry.add_device(NewDevice(identity="dev-15"))
        with pytest.raises(RegistryRefused, match=r"line 16: identity 'dev-15' is taken .* goes on there"):
            list(importer.write())
    assert len(registry.devices()) == 11, "the first chunk, and nothing of the second"
    registry.remove_device("default", "dev-15")
    assert run(registry, path, format="mosquitto").added == 20


def test_a_file_that_is_written_to_is_not_imported(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_CREDENTIALS_PER_CHUNK", 10)
    path = many(tmp_path / "psk", 30)
    with registry.importer(path, ImportOptions(format="mosquitto")) as importer:
        list(importer.check())
        with path.open("a") as file:
            file.write(f"more:{KEY}\n")
        with pytest.raises(RegistryRefused, match="was changed while it was read"):
            list(importer.write())
    assert registry.devices() == []


def test_changes_of_devices_that_lie_apart_are_changes_apart(
    registry: Registry, engine: Engine, tmp_path: Path
) -> None:
    run(registry, many(tmp_path / "psk", 1200), format="mosquitto")
    with engine.connect() as connection:
        start = feed.head(connection).sequence
    numbers = [5, 6, 10, 400, 800, 801, 1199]
    (tmp_path / "some").write_text("".join(f"dev-{number}:{'ab' * 16}\n" for number in numbers))
    counts = run(registry, tmp_path / "some", format="mosquitto", on_conflict="update")
    assert counts.updated == counts.shared.count == len(numbers)
    with engine.connect() as connection:
        changes = feed.changes_after(connection, start, 100)
        ids = dict(connection.execute(select(schema.devices.c.name, schema.devices.c.id)).all())
    assert [change.sequence for change in changes] == list(range(start + 1, start + 5))
    for number in numbers:
        assert any(each.first_id <= ids[f"dev-{number}"] <= each.last_id for each in changes)
    assert [change.width for change in changes] == [6, 1, 2, 1]
    assert registry.verify_audit().faults == []


def test_shared_keys_are_counted(registry: Registry, tmp_path: Path) -> None:
    registry.add_device(NewDevice(identity="there", key=Key(bytes.fromhex(KEY))))
    path = tmp_path / "psk"
    path.write_text(f"a:{KEY}\nb:{'ab' * 16}\nc:{'ab' * 16}\nd:{'cd' * 16}\n")
    shared = run(registry, path, format="mosquitto").shared
    assert shared.count == 3
    assert sorted(shared.examples) == ["default/a and default/there", "default/b and default/c"]


def test_a_chunk_costs_the_same_however_many_devices_are_there(
    new_registry: Callable[[str, Path], RegistrySettings], tmp_path: Path
) -> None:
    """Counted in steps of SQLite's own machine, which no busy host disturbs."""
    newcomers = many(tmp_path / "newcomers", 100)
    hundreds = 0

    def count() -> int:
        nonlocal hundreds
        hundreds += 1
        return 0

    def watch(connection: Connection, *_: object) -> None:
        database = connection.connection.driver_connection
        assert isinstance(database, sqlite3.Connection)
        database.set_progress_handler(count, 100)

    def steps(registry: Registry) -> int:
        nonlocal hundreds
        hundreds = 0
        event.listen(Engine, "before_cursor_execute", watch)
        try:
            assert len(check(registry, newcomers, format="mosquitto")) == 100
        finally:
            event.remove(Engine, "before_cursor_execute", watch)
        return hundreds

    with Registry(new_registry(f"sqlite:///{tmp_path}/registry.db", tmp_path), Author("a", "b")) as registry:
        counted = []
        for first, last in ((0, 300), (300, 3_000)):
            documents = (device(f"there-{number}") for number in range(first, last))
            run(registry, write_lines(tmp_path / "there", documents), format="jsonl")
            counted.append(steps(registry))
        few, many_more = counted
        assert 0 < many_more < 1.5 * few, counted


def test_a_removed_realm_takes_its_unfinished_imports_along(
    registry: Registry, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_CREDENTIALS_PER_CHUNK", 10)
    registry.add_realm("short")
    path = many(tmp_path / "psk", 30)
    with registry.importer(path, ImportOptions(format="mosquitto", realm="short")) as importer:
        list(importer.check())
        next(importer.write())
    registry.remove_realm("short", with_devices=True)
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(schema.imports)).scalar_one() == 0
    with pytest.raises(RegistryRefused, match="realm 'short' does not exist"):
        check(registry, path, format="mosquitto", realm="short")
