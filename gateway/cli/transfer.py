"""Files of devices: import-devices, export-devices."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.options import (
    ConfigOption,
    JsonOption,
    LabelOption,
    load_settings,
    open_registry,
    parse_labels,
)
from gateway.cli.output import print_json, warn
from gateway.errors import RegistryRefused

if TYPE_CHECKING:
    from rich.progress import Progress

    from gateway.registry.exporting import ExportCounts
    from gateway.registry.importing import Finding, ImportCounts, Importer

__all__ = ["app"]

app = typer.Typer()

PANEL = "Devices"

_INTERRUPTED = 130

FormatName = Literal["stunnel", "mosquitto", "emqx", "gnutls", "hono", "azure-dps", "csv", "jsonl"]
FormatOption = Annotated[
    FormatName, typer.Option("--format", help="What the file is; docs/import.md describes each.")
]
EncodingOption = Annotated[
    Literal["hex", "base64", "text", "hex-or-text"] | None,
    typer.Option(
        "--key-encoding", help="How keys are written. Default: as the format has it.", show_default=False
    ),
]
GroupRealmOption = Annotated[str, typer.Option("--realm", metavar="REALM", help="Realm of the devices.")]


@app.command(rich_help_panel=PANEL)
def import_devices(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of devices.")],
    *,
    format_name: FormatOption,
    key_encoding: EncodingOption = None,
    realm: GroupRealmOption = "default",
    group: Annotated[
        str | None,
        typer.Option(metavar="GROUP", help="Group of those that have none in the file.", show_default=False),
    ] = None,
    label: LabelOption = None,
    on_conflict: Annotated[
        Literal["fail", "skip", "update"],
        typer.Option(help="What to do with devices and identities that are there already."),
    ] = "fail",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change and every bad line; write nothing.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add devices from a file, of another product or our own; interrupted, the same command goes on."""
    labels = parse_labels(label)
    settings = load_settings(config)

    from gateway.net.loop import freeze
    from gateway.registry.importing import ImportOptions

    options = ImportOptions(
        format=format_name,
        realm=realm,
        key_encoding=key_encoding,
        on_conflict=on_conflict,
        group=group,
        labels=labels,
    )
    left = "nothing was written"
    try:
        with open_registry(settings) as registry, registry.importer(file, options) as importer:
            freeze()  # a million devices make the collector look through all that is loaded time and again
            if dry_run:
                _dry_run(importer, as_json=as_json)
                return
            ignored = _check(importer)
            left = "the same command goes on where it was"
            counts = _write(importer)
    except KeyboardInterrupt:
        print(f"error: interrupted: {left}", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None
    _report(importer, counts, ignored, options.realm, as_json=as_json)


def _dry_run(importer: "Importer", *, as_json: bool) -> None:
    """Every line, as it is found: there may be a million."""
    totals: dict[str, int] = dict.fromkeys(_TOTALS.values(), 0)
    separator = '{\n  "lines": ['
    for finding in _checked(importer):
        totals[_TOTALS[finding.verdict]] += 1
        if finding.verdict == "done":
            continue
        if not as_json:
            print(f"line {finding.line}: {finding.verdict} {finding.text}")
            continue
        entry = {"line": finding.line, "verdict": finding.verdict, "text": finding.text}
        sys.stdout.write(f"{separator}\n    {json.dumps(entry)}")
        separator = ","
    if as_json:
        sys.stdout.write(separator if separator != "," else "")
        sys.stdout.write(f"],\n  {json.dumps(totals)[1:-1]}\n}}\n")
    else:
        print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in totals.items()))
    if totals["bad"]:
        raise RegistryRefused(
            f"{totals['bad']:,} bad lines: repair or take them out, nothing would be imported"
        )


_TOTALS = {
    "add": "to_add",
    "update": "to_update",
    "same": "unchanged",
    "skip": "skipped",
    "done": "imported_before",
    "ignore": "ignored",
    "bad": "bad",
}
"""By verdict, the name of its count."""


def _check(importer: "Importer") -> int:
    """How many entries are ignored. Raises RegistryRefused when a line is bad."""
    ignored = bad = 0
    first: Finding | None = None
    for finding in _checked(importer):
        ignored += finding.verdict == "ignore"
        if finding.verdict == "bad":
            bad += 1
            first = first or finding
    if first is not None:
        more = f" ({bad - 1:,} more bad lines: --dry-run shows all)" if bad > 1 else ""
        raise RegistryRefused(
            f"{importer.file.path} line {first.line}: {first.text}{more}; nothing was imported"
        )
    return ignored


def _checked(importer: "Importer") -> "Iterator[Finding]":
    with _progress("checking", importer.file.size) as (progress, task):
        for number, finding in enumerate(importer.check()):
            if number % 1000 == 0:
                progress.update(task, completed=importer.file.position)
            yield finding


def _write(importer: "Importer") -> "ImportCounts":
    from gateway.registry.importing import ImportCounts

    counts = ImportCounts(done=importer.begins_after.devices)
    with _progress("importing", importer.devices) as (progress, task):
        for counts in importer.write():
            progress.update(task, completed=counts.devices)
    return counts


def _report(importer: "Importer", counts: "ImportCounts", ignored: int, realm: str, *, as_json: bool) -> None:
    numbers = {
        "added": counts.added,
        "updated": counts.updated,
        "unchanged": counts.unchanged,
        "skipped": counts.skipped,
        "imported_before": counts.done,
        "ignored": ignored,
    }
    if as_json:
        shared = {"shared_keys": counts.shared.count}
        print_json({"file": str(importer.file.path), "realm": realm, **numbers, **shared})
    else:
        said = [f"{count:,} {name.replace('_', ' ')}" for name, count in numbers.items() if count]
        print(f"Imported {importer.file.path} into realm {realm}: {', '.join(said) or 'it has no device'}.")
    if counts.shared.count:
        warn(
            f"{counts.shared.count:,} of the imported keys are those of other credentials too, such as "
            f"{'; '.join(counts.shared.examples)}: a key belongs to one device and one identity"
        )


@app.command(rich_help_panel=PANEL)
def export_devices(
    *,
    format_name: FormatOption,
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FILE", help="Where to write; it is for its owner alone (0600)."),
    ],
    with_keys: Annotated[bool, typer.Option("--with-keys", help="Write keys, too.")] = False,
    key_encoding: EncodingOption = None,
    realm: GroupRealmOption = "default",
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Only devices of this group.", show_default=False)
    ] = None,
    label: LabelOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write devices into a file, for another product or for import-devices; keys only with --with-keys."""
    labels = parse_labels(label)
    settings = load_settings(config)

    from gateway.registry.exporting import ExportCounts, ExportOptions

    options = ExportOptions(
        format=format_name,
        realm=realm,
        key_encoding=key_encoding,
        with_keys=with_keys,
        group=group,
        labels=labels,
    )
    counts = ExportCounts()
    with open_registry(settings) as registry, _progress("exporting", None) as (progress, task):
        for counts in registry.exporter(options).write(output):
            progress.update(task, completed=counts.devices)
    _report_export(counts, output, as_json=as_json)


def _report_export(counts: "ExportCounts", output: Path, *, as_json: bool) -> None:
    if as_json:
        document: dict[str, Any] = {
            "output": str(output),
            "devices": counts.devices,
            "credentials": counts.credentials,
            "left_out": dict(counts.left_out),
            "unsaid": dict(counts.unsaid),
        }
        print_json(document)
        return
    print(f"Wrote {counts.credentials:,} credentials of {counts.devices:,} devices to {output}.")
    for why, count in counts.left_out.items():
        warn(f"{count:,} credentials were left out: {why}")
    for feature, count in counts.unsaid.items():
        warn(f"of {count:,} devices the format cannot say: {feature}")


@contextlib.contextmanager
def _progress(what: str, total: int | None) -> "Iterator[tuple[Progress, Any]]":
    """A bar on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        yield progress, progress.add_task(what, total=total)
