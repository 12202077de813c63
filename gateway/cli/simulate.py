"""simulate: a whole fleet on one machine."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.dial import ServerNameOption, TimeoutOption, TlsOption, parse_address, raise_file_limit
from gateway.cli.options import JsonOption
from gateway.cli.output import print_fields, print_json
from gateway.errors import ConfigurationError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.device.fleet_report import FleetReport, Latencies

__all__ = ["app"]

app = typer.Typer()

Spread = Literal["fixed", "uniform", "exponential"]
FILES_BESIDE = 64


@app.command(rich_help_panel="Devices' end")
def simulate(  # noqa: PLR0917 -- typer takes options as parameters
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The gateway's listener.")],
    keys: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Identities and keys, `identity:hex` per line, 0600.", show_default=False
        ),
    ],
    devices: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="So many of them. Default: all.", show_default=False),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Default: one per core.", show_default=False)
    ] = None,
    duration: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How long.")] = 30.0,
    rate: Annotated[
        float,
        typer.Option(metavar="N", min=0, help="Devices that arrive per second; 0: a storm, all at once."),
    ] = 0.0,
    connecting: Annotated[
        int, typer.Option(metavar="N", min=1, help="Handshakes at the same time, at most.")
    ] = 256,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Mean time between messages of a device; 0: none.")
    ] = 1.0,
    interval_spread: Annotated[Spread, typer.Option(help="How it is spread.")] = "exponential",
    size: Annotated[int, typer.Option(metavar="BYTES", min=2, help="Mean size of a message.")] = 100,
    size_spread: Annotated[Spread, typer.Option(help="How it is spread.")] = "fixed",
    churn: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="Mean length of a session, then it is begun anew; 0: it stays."
        ),
    ] = 0.0,
    wrong_key: Annotated[int, typer.Option(metavar="N", min=0, help="Bad actors with a wrong key.")] = 0,
    unknown: Annotated[
        int, typer.Option(metavar="N", min=0, help="Bad actors with an unknown identity.")
    ] = 0,
    slow: Annotated[int, typer.Option(metavar="N", min=0, help="Bad actors with one byte per second.")] = 0,
    silent: Annotated[int, typer.Option(metavar="N", min=0, help="Bad actors that say nothing.")] = 0,
    server_name: ServerNameOption = None,
    tls: TlsOption = None,
    timeout: TimeoutOption = 10.0,
    prometheus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write metrics there every second, as text for Prometheus.",
            show_default=False,
        ),
    ] = None,
    max_failed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Failed handshakes that are all right.")
    ] = 0,
    max_lost: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Refused and unanswered messages, and cut sessions, that are all right."
        ),
    ] = 0,
    max_handshake_p99: Annotated[
        float | None,
        typer.Option(metavar="MS", min=0, help="Bound of 99 % of handshakes.", show_default=False),
    ] = None,
    max_answer_p99: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="Bound of 99 % of answers.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Connect a fleet of devices and let them send, with bad actors beside them."""
    from gateway.device.fleet import FleetPlan
    from gateway.device.fleet_processes import run_fleet, split_plan
    from gateway.net import loop

    target = parse_address(address, "HOST:PORT")
    processes = processes or len(os.sched_getaffinity(0))
    bad = {"wrong-key": wrong_key, "unknown": unknown, "slow": slow, "silent": silent}
    fleet = _read_keys(keys, devices)
    plan = FleetPlan(
        target.host,
        target.port,
        fleet,
        server_name,
        tls,
        timeout,
        rate,
        max(1, connecting // processes),
        duration,
        interval,
        interval_spread,
        size,
        size_spread,
        churn,
        {kind: count for kind, count in bad.items() if count},
    )
    plans = split_plan(plan, processes)
    raise_file_limit(max(len(share.devices) + sum(share.bad.values()) for share in plans) + FILES_BESIDE)
    with _live_table(show=not as_json and sys.stderr.isatty()) as show:

        def tell(report: "FleetReport") -> None:
            show(report)
            if prometheus is not None:
                _write_metrics(prometheus, report)

        report = loop.run(run_fleet(plans, tell))
        if prometheus is not None:
            _write_metrics(prometheus, report)
    if as_json:
        print_json(_document(report))
    else:
        print_fields(_fields(report))
    _judge(report, max_failed, max_lost, max_handshake_p99, max_answer_p99)


def _read_keys(path: Path, count: int | None) -> tuple[tuple[str, str], ...]:
    """The first `count` lines; an identity may hold a colon, a key never does."""
    from gateway.device.keyring import check_private
    from gateway.registry.identities import parse_key_hex

    found: list[tuple[str, str]] = []
    try:
        check_private(path, "key list")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(found) == count:
                    break
                identity, colon, key = line.strip().rpartition(":")
                if not line.strip() or line.startswith("#"):
                    continue
                if not colon:
                    raise ConfigurationError(f"key list {path}, line {number}: write identity:hex")
                found.append((identity, parse_key_hex(key).hex()))
    except OSError as exc:
        raise ConfigurationError(f"key list {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"key list {path} is not UTF-8") from exc
    if count is not None and len(found) < count:
        raise ConfigurationError(f"key list {path} has {len(found)} devices, {count} are asked for")
    if not found:
        raise ConfigurationError(f"key list {path} has no device")
    return tuple(found)


@contextlib.contextmanager
def _live_table(*, show: bool) -> "Iterator[Callable[[FleetReport], None]]":
    """A table on the terminal that is drawn anew with every report."""
    if not show:
        yield lambda _report: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def table(report: "FleetReport") -> Table:
        drawn = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in _fields(report):
            drawn.add_row(name, value)
        return drawn

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield lambda report: live.update(table(report), refresh=True)


def _fields(report: "FleetReport") -> list[tuple[str, str]]:
    failed = sum(report.handshakes_failed.values())
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(report.refused.items()))
    fields = [
        ("devices", f"{report.devices:,}"),
        (
            "sessions",
            f"{report.sessions:,} open, {report.sessions_max:,} at most, {report.sessions_cut:,} cut",
        ),
        ("handshakes", f"{report.handshakes:,} done, {failed:,} failed; {_milliseconds(report.handshake)}"),
        ("messages", f"{report.messages:,} sent, {report.held_back:,} held back"),
        (
            "answers",
            f"{report.acknowledged:,} ok, {refused or 'none refused'}, {report.unanswered:,} missing; {_milliseconds(report.answer)}",
        ),
    ]
    if report.bad or report.bad_admitted:
        bad = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.bad.items()))
        fields.append(("bad actors", f"turned away: {bad or 'none yet'}; let in: {report.bad_admitted}"))
    fields.append(("simulation", f"{report.cpu_s:.1f} s of CPU, {report.memory_bytes / 2**20:.0f} MiB"))
    most = sorted(report.handshakes_failed.items(), key=lambda item: -item[1])
    return fields + [("failed", f"{count:,}: {reason}") for reason, count in most[:3]]


def _milliseconds(latencies: "Latencies") -> str:
    values = [latencies.quantile(share) for share in (0.5, 0.99)]
    if values[0] is None or values[1] is None:
        return "no times yet"
    return f"p50 {values[0] * 1000:.1f} ms, p99 {values[1] * 1000:.1f} ms"


def _document(report: "FleetReport") -> dict[str, Any]:
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(report)
    for name, latencies in (("handshake", report.handshake), ("answer", report.answer)):
        document[name] = {
            "count": sum(latencies.counts),
            **{f"p{share * 100:g}_s": latencies.quantile(share) for share in (0.5, 0.9, 0.99, 0.999)},
            "longest_s": latencies.longest_s,
        }
    return document


def _write_metrics(path: Path, report: "FleetReport") -> None:
    """Whole or not at all, as a collector of text files wants it."""
    from gateway.device.fleet_report import prometheus_text

    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(prometheus_text(report))
    unfinished.replace(path)


def _judge(
    report: "FleetReport",
    max_failed: int,
    max_lost: int,
    max_handshake_p99_ms: float | None,
    max_answer_p99_ms: float | None,
) -> None:
    """Raise DeviceError with every bound that does not hold."""
    complaints = []
    failed = sum(report.handshakes_failed.values())
    lost = sum(report.refused.values()) + report.unanswered + report.sessions_cut
    if report.devices and not report.handshakes:
        complaints.append("no device came in")
    if failed > max_failed:
        most = max(report.handshakes_failed.items(), key=lambda item: item[1])[0]
        complaints.append(f"{failed} handshakes failed, {max_failed} are allowed (most: {most})")
    if lost > max_lost:
        complaints.append(
            f"{lost} messages or sessions were refused, unanswered or cut, {max_lost} are allowed"
        )
    if report.bad_admitted:
        complaints.append(f"{report.bad_admitted} bad actors were let in")
    for what, latencies, bound_ms in (
        ("handshakes", report.handshake, max_handshake_p99_ms),
        ("answers", report.answer, max_answer_p99_ms),
    ):
        p99_s = latencies.quantile(0.99)
        if bound_ms is not None and p99_s is not None and p99_s * 1000 > bound_ms:
            complaints.append(f"p99 of {what} is {p99_s * 1000:.1f} ms, {bound_ms:g} ms are allowed")
    if complaints:
        raise DeviceError("; ".join(complaints))
