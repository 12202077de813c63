"""The chained audit: what it says, and what its check finds, on every database."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, insert, select, update

from gateway.errors import RegistryRefused
from gateway.registry import schema
from gateway.registry.audit import AuditFilter, Head
from gateway.registry.database import write
from gateway.registry.founding import initialise
from gateway.registry.ledger import Author
from gateway.registry.settings import RegistrySettings
from gateway.registry.store import NewDevice, Registry

AUDIT, FEED = schema.audit, schema.feed


@pytest.fixture
def filled(registry: Registry) -> Registry:
    """Rows 1 (the realm) to 6, and a change without a row between 4 and 6."""
    for name in "abc":
        registry.add_device(NewDevice(identity=name))
    registry.begin_service_day()
    registry.set_device_enabled("default", "a", enabled=False)
    return registry


def test_a_whole_audit_is_whole(filled: Registry) -> None:
    report = filled.verify_audit()
    assert (report.rows, report.faults) == (5, [])
    assert report.head is not None
    assert report.head.sequence == 6
    assert Head.parse(str(report.head)) == report.head
    assert filled.audit_head() == report.head
    assert filled.verify_audit(report.head).faults == []
    filled.remove_device("default", "a")
    assert filled.verify_audit(report.head).faults == [], "a head of before"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("actor", "mallory"),
        ("source", "elsewhere"),
        ("action", "nothing"),
        ("subject", "default/z"),
        ("detail", "{}"),
        ("at", dt.datetime(2031, 1, 1, tzinfo=dt.UTC)),
    ],
)
def test_a_changed_row_is_found(filled: Registry, engine: Engine, column: str, value: object) -> None:
    write(engine, lambda c: c.execute(update(AUDIT).where(AUDIT.c.sequence == 3).values({column: value})))
    assert filled.verify_audit().faults == ["row 3 was changed, or the one before it was"]


def test_a_missing_row_is_found(filled: Registry, engine: Engine) -> None:
    write(engine, lambda c: c.execute(delete(AUDIT).where(AUDIT.c.sequence == 3)))
    assert filled.verify_audit().faults == ["missing: the rows after 2, up to 3"]


def test_a_missing_row_is_found_also_when_its_traces_are_wiped(filled: Registry, engine: Engine) -> None:
    write(engine, lambda c: c.execute(delete(AUDIT).where(AUDIT.c.sequence == 3)))
    write(engine, lambda c: c.execute(update(AUDIT).where(AUDIT.c.sequence == 4).values(previous=2)))
    assert filled.verify_audit().faults == ["row 4 was changed, or the one before it was"]


def test_a_missing_first_row_is_found(filled: Registry, engine: Engine) -> None:
    write(engine, lambda c: c.execute(delete(AUDIT).where(AUDIT.c.sequence <= 2)))
    assert filled.verify_audit().faults == ["missing: the rows after 0, up to 2"]


def test_an_added_row_is_found(filled: Registry, engine: Engine) -> None:
    with engine.connect() as connection:
        row = dict(connection.execute(select(AUDIT).where(AUDIT.c.sequence == 4)).one()._mapping)
    write(engine, lambda c: c.execute(insert(AUDIT).values(**row | {"sequence": 5, "previous": 4})))
    faults = filled.verify_audit().faults
    assert "row 5 was changed, or the one before it was" in faults
    write(
        engine,
        lambda c: c.execute(update(AUDIT).where(AUDIT.c.sequence == 5).values(previous=None, chain=None)),
    )
    (fault,) = filled.verify_audit().faults
    assert fault.startswith("row 5 has no link")


def test_an_audit_that_was_cut_off_is_found(filled: Registry, engine: Engine) -> None:
    held = filled.audit_head()
    write(engine, lambda c: c.execute(delete(AUDIT).where(AUDIT.c.sequence >= 4)))
    assert filled.verify_audit().faults == ["cut off: the rows after 3, up to 6, are missing"]
    with engine.connect() as connection:
        chain = connection.execute(select(AUDIT.c.chain).where(AUDIT.c.sequence == 3)).scalar_one()
    write(engine, lambda c: c.execute(update(FEED).values(audit_sequence=3, audit_chain=chain)))
    assert filled.verify_audit().faults == [], "an older head was put back: this needs a head that was kept"
    assert filled.verify_audit(held).faults == ["cut off: row 6, which the head was taken of, is missing"]
    filled.add_device(NewDevice(identity="x"))
    assert filled.verify_audit(held).faults != []


def test_another_history_is_not_that_of_the_head(filled: Registry) -> None:
    held = filled.audit_head()
    assert held is not None
    assert filled.verify_audit(Head(held.sequence, bytes(32))).faults == [
        "row 6 is not the one that the head was taken of"
    ]


@pytest.mark.parametrize("text", ["", "6", "6-", "6-zz", "x-" + "00" * 32, "0-" + "00" * 32, "6-00"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(RegistryRefused, match="is no head of the audit"):
        Head.parse(text)


def test_rows_are_filtered(filled: Registry, settings: RegistrySettings) -> None:
    with Registry(settings, Author("bob", "desk")) as other:
        other.add_realm("default2")
        other.add_device(NewDevice(identity="d", realm="default2"))

    def found(newest: int | None = None, **wanted: str) -> list[int]:
        return [row.sequence for row in filled.audit_rows(AuditFilter(**wanted), newest=newest)]  # type: ignore[arg-type]

    assert found() == [1, 2, 3, 4, 6, 7, 8]
    assert found(newest=2) == [7, 8]
    assert found(actor="bob") == [7, 8]
    assert found(action="add-device") == [2, 3, 4, 8]
    assert found(action="add-device", newest=1, actor="alice") == [4]
    assert found(subject="default/a") == [2, 6]
    assert found(subject="default") == [1, 2, 3, 4, 6]
    assert found(subject="none") == []
    since = AuditFilter(since=dt.datetime(2030, 6, 1, tzinfo=dt.UTC))
    assert [row.actor for row in filled.audit_rows(since)] == []
    until = AuditFilter(until=dt.datetime(2030, 1, 1, tzinfo=dt.UTC))
    assert {row.actor for row in filled.audit_rows(until)} == {"bob"}, "written today"


def test_rows_of_before_the_chain_are_chained_once(
    filled: Registry, settings: RegistrySettings, engine: Engine
) -> None:
    write(engine, lambda c: c.execute(update(AUDIT).values(previous=None, chain=None)))
    write(engine, lambda c: c.execute(update(FEED).values(audit_sequence=0, audit_chain=None)))
    assert len(filled.verify_audit().faults) == 5
    assert not initialise(settings, Author("alice", "console"))
    assert filled.verify_audit().faults == []
    head = filled.audit_head()
    initialise(settings, Author("alice", "console"))
    assert filled.audit_head() == head


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # one database is enough
def test_another_registry_has_other_links(
    filled: Registry, tmp_path: Path, new_registry: Callable[[str, Path], RegistrySettings]
) -> None:
    (tmp_path / "other").mkdir()
    other = new_registry(f"sqlite:///{tmp_path / 'other' / 'registry.db'}", tmp_path / "other")
    with Registry(other, Author("alice", "console")) as registry:
        assert registry.verify_audit(Head(1, bytes(32))).faults
    assert filled.verify_audit().faults == []
