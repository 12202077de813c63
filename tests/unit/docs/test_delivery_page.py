"""docs/delivery.md says what the validator does, and describes every setting."""

from pathlib import Path

from gateway.forward.route import COMBINATIONS, Combination
from gateway.forward.settings import RouteSettings, SpoolSettings

PAGE = Path(__file__).parents[3] / "docs" / "delivery.md"
SPOOL_METRICS = (
    "messages",
    "bytes",
    "oldest_seconds",
    "dead_letters",
    "damaged_messages",
    "commit_duration_seconds",
)


def rendered() -> list[str]:
    """The table of combinations, rows that differ in framing or backend alone put together."""
    framings: dict[tuple[object, ...], list[str]] = {}
    for row in COMBINATIONS:
        framings.setdefault((row.backend, row.delivery, row.ack, row.reply), []).append(row.framing)
    backends: dict[tuple[object, ...], list[str]] = {}
    for (backend, *rest), names in framings.items():
        backends.setdefault((tuple(names), *rest), []).append(str(backend))
    lines = ["| framing | backend | delivery | ack | reply |", "|---|---|---|---|---|"]
    for (framing, delivery, ack, reply), kinds in backends.items():
        cells = (_code(framing), _code(kinds), _code([delivery]), _flags(ack), _flags(reply))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _code(names: object) -> str:
    assert isinstance(names, tuple | list)
    return ", ".join(f"`{name}`" for name in names)


def _flags(values: object) -> str:
    assert isinstance(values, tuple)
    return " or ".join("yes" if value else "no" for value in values)


def test_the_table_is_the_validator() -> None:
    table = "\n".join(rendered())
    assert table in PAGE.read_text(), f"put this into {PAGE.name}:\n{table}"


def test_no_combination_twice() -> None:
    keys = [
        (row.framing, row.backend, row.delivery, ack, reply)
        for row in COMBINATIONS
        for ack in row.ack
        for reply in row.reply
    ]
    assert len(keys) == len(set(keys))
    assert Combination._fields == ("framing", "backend", "delivery", "ack", "reply")


def test_every_key_is_described_with_its_default() -> None:
    page = PAGE.read_text()
    for name, field in SpoolSettings.model_fields.items():
        assert f"`spool.{name}`" in page
        assert f"| `{field.default}` |" in page or f"| `{field.default:g}` |" in page, name
    for name in ("delivery", "delivery_timeout_s", "device_messages_per_s", "device_bytes_per_s"):
        assert name in RouteSettings.model_fields
        assert f"`{name}`" in page


def test_every_metric_of_the_outbox_is_described() -> None:
    page = PAGE.read_text()
    for name in SPOOL_METRICS:
        assert f"`pskgw_outbox_{name}`" in page
