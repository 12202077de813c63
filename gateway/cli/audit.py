"""audit-log: who changed what, and whether that is still as it was written."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.options import ConfigOption, JsonOption, load_settings, open_registry, parse_time
from gateway.cli.output import print_json, print_json_array, print_table, remark, rfc3339
from gateway.errors import RegistryMismatch

if TYPE_CHECKING:
    from gateway.registry.audit import AuditRow
    from gateway.registry.store import Registry

__all__ = ["app"]

app = typer.Typer()

ROWS_SHOWN = 1_000


@app.command(rich_help_panel="Registry")
def audit_log(
    *,
    actor: Annotated[
        str | None, typer.Option(metavar="USER", help="Only what this user did.", show_default=False)
    ] = None,
    action: Annotated[
        str | None,
        typer.Option(metavar="ACTION", help="Only this, such as revoke-key.", show_default=False),
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            metavar="SUBJECT",
            help="Only of this REALM (with its devices) or REALM/DEVICE.",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only from this time on.", show_default=False)
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only before this time.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help=f"Only the newest N. Default: {ROWS_SHOWN}, with --json all.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that no row was changed, taken out or cut off.")
    ] = False,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="HEAD",
            help="With --verify: a head that was kept, as the log line audit_head has it.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who changed what in the registry, oldest first, or check that the audit is whole."""
    if head is not None and not verify:
        raise typer.BadParameter("it is held against the audit by --verify", param_hint="--head")
    times = (parse_time(since, "--since"), parse_time(until, "--until"))
    settings = load_settings(config)

    from gateway.registry.audit import AuditFilter

    with open_registry(settings) as registry:
        if verify:
            _verify(registry, head, as_json=as_json)
            return
        wanted = AuditFilter(actor=actor, action=action, subject=subject, since=times[0], until=times[1])
        if as_json:
            print_json_array(_document(row) for row in registry.audit_rows(wanted, newest=limit))
            return
        rows = list(registry.audit_rows(wanted, newest=limit or ROWS_SHOWN))
    columns = ("time", "user", "from", "action", "subject", "detail")
    print_table(
        columns,
        [
            (
                rfc3339(row.at.replace(microsecond=0)),
                row.actor,
                row.source,
                row.action,
                row.subject,
                row.detail.strip("{}"),
            )
            for row in rows
        ],
    )
    if limit is None and len(rows) == ROWS_SHOWN:
        remark(f"These are the newest {ROWS_SHOWN}: there may be more, see --limit.")


def _verify(registry: "Registry", head: str | None, *, as_json: bool) -> None:
    from gateway.registry.audit import Head

    report = registry.verify_audit(None if head is None else Head.parse(head))
    shown = None if report.head is None else str(report.head)
    if as_json:
        print_json({"rows": report.rows, "head": shown, "faults": report.faults})
    elif not report.faults:
        print(f"The audit is whole: {report.rows:,} rows. Its head is {shown}")
    if report.faults:
        raise RegistryMismatch(
            f"the audit is not as it was written: {'; '.join(report.faults)}: compare it with a backup"
        )


def _document(row: "AuditRow") -> dict[str, Any]:
    return {
        "sequence": row.sequence,
        "time": rfc3339(row.at),
        "actor": row.actor,
        "source": row.source,
        "action": row.action,
        "subject": row.subject,
        "detail": row.details,
    }
