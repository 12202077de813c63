import pytest

from tests.support.commands import Run


@pytest.mark.usefixtures("folder")
def test_realms_are_added_and_listed(run: Run) -> None:
    added = run("add-realm", "plant", "--hint", "plant hint", "--record-bytes-max", "512", "--json").document
    assert (added["realm"], added["hint"], added["record_bytes_max"]) == ("plant", "plant hint", 512)
    assert run("add-realm", "office").out == "Added realm office.\n"

    realms = run("list-realms", "--json").document
    assert [(realm["realm"], realm["hint"]) for realm in realms] == [
        ("default", None),
        ("office", None),
        ("plant", "plant hint"),
    ]
    assert all(realm["created_at"].endswith("Z") for realm in realms)
    table = run("list-realms").out
    assert table.splitlines()[0].split() == ["REALM", "HINT", "KEYS", "RECORD", "BYTES", "ADDED"]
    assert "plant hint" in table


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["default"], "realm 'default' is there already"),
        ([""], "a realm name has 1 to 64 characters"),
        (["r" * 65], "a realm name has 1 to 64 characters"),
        (["r", "--hint", ""], "the hint is empty"),
        (["r", "--hint", "h" * 129], "the hint has 129 bytes"),
        (["r", "--record-bytes-max", "63"], "records of 63 bytes: from 64 to 16384 are possible"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("add-realm", *arguments, status=1).err
    assert len(run("list-realms", "--json").document) == 1
