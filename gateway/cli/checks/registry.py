"""Does the registry answer, does its schema fit, and how old is this node's copy?"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from gateway.cli.checks.finding import Finding, Status
from gateway.errors import GatewayError, RegistryMismatch, RegistryUnavailable

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.registry.feed import Head

__all__ = ["check_clock", "check_registry", "check_replica"]

CLOCK_DIFFERENCE_MAX_S: Final = 5.0
"""Credentials are valid from and to points in time: the clocks of node and registry may differ by a little only."""
REPLICA_AGE_MAX_S: Final = 300.0
"""A follower that runs stores the time of its last good poll every minute."""
MOMENT_OF_WRITING: Final = 1_767_225_600.0
"""2026-01-01: no clock that is set shows an earlier time."""


def check_registry(settings: "GatewaySettings", found: "list[Head]") -> Iterator[Finding]:
    from gateway.registry import feed
    from gateway.registry.database import make_engine, read
    from gateway.registry.founding import open_secrets
    from gateway.registry.migrate import check_schema

    engine = make_engine(settings.registry.url)
    try:
        check_schema(engine)
        with read(engine) as connection:
            head = feed.head(connection)
            count = feed.credential_count(connection)
        found.append(head)
        credentials = f"{count:,} credential{'' if count == 1 else 's'}"
        yield Finding("registry", "ok", f"it answers, its schema fits, it has {credentials}")
    except RegistryMismatch as exc:
        yield Finding("registry", "error", str(exc), "run `gatewayctl migrate`, or the newer program")
        return
    except RegistryUnavailable as exc:
        yield Finding("registry", "error", str(exc), "start the database, and check registry.url")
        return
    finally:
        engine.dispose()
    try:
        source = settings.registry.master_keys()
        with read(engine) as connection:
            open_secrets(connection, source.sealer(), source.place)
    except GatewayError as exc:
        yield Finding(
            "master key",
            "error",
            str(exc),
            "put the master key of this registry where registry.master_key_* says",
        )
    else:
        yield Finding("master key", "ok", f"{source.place} opens the registry")
    finally:
        engine.dispose()


def check_replica(settings: "GatewaySettings", head: "Head | None", *, is_running: bool) -> Iterator[Finding]:
    from gateway.registry.replica import ReplicaReader, current_generation

    folder = settings.node.data_dir / "replica"
    generation = current_generation(folder)
    if generation is None:
        text = "there is none yet: the gateway copies the registry when it starts"
        if is_running:
            yield Finding(
                "replica",
                "error",
                "the gateway runs and has no replica",
                "see its log for `follower`, it says why",
            )
        else:
            yield Finding("replica", "ok", text)
        return
    remake = f"stop the gateway, delete {folder}, start it: the replica is copied anew"
    try:
        with ReplicaReader.open(generation) as reader:
            meta = reader.meta()
    except GatewayError as exc:
        yield Finding("replica", "error", str(exc), remake)
        return
    if meta is None:
        yield Finding("replica", "error", f"{generation} cannot be read", remake)
    elif head is not None and meta.registry_id != head.registry_id:
        status: Status = "error" if is_running else "warning"
        yield Finding("replica", status, "it is a copy of another registry", remake)
    elif is_running and time.time() - meta.polled_at > REPLICA_AGE_MAX_S:
        age_s = time.time() - meta.polled_at
        yield Finding(
            "replica",
            "error",
            f"it was last compared with the registry {age_s:.0f} s ago",
            "see the log for `follower`, it says why",
        )
    else:
        behind = "" if head is None else f", {max(0, head.sequence - meta.sequence)} changes behind"
        yield Finding("replica", "ok", f"it can be read{behind}")


def check_clock(settings: "GatewaySettings") -> Iterator[Finding]:
    fix = "set the clock by NTP: systemctl enable --now systemd-timesyncd"
    now = time.time()
    if now < MOMENT_OF_WRITING:
        yield Finding("clock", "error", f"it shows {time.strftime('%Y-%m-%d', time.gmtime(now))}", fix)
        return
    difference_s = _database_clock(settings.registry.url)
    if difference_s is not None and abs(difference_s) > CLOCK_DIFFERENCE_MAX_S:
        yield Finding("clock", "error", f"it differs from the registry's by {difference_s:+.1f} s", fix)
        return
    compared = "" if difference_s is None else ", and the registry's agrees"
    yield Finding(
        "clock", "ok", f"it shows {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(now))}{compared}"
    )


def _database_clock(url: str) -> float | None:
    """Seconds that the clock of the database's host is ahead of ours; None where it is the same host's."""
    from sqlalchemy import text

    from gateway.registry.database import make_engine, read

    if url.startswith("sqlite"):
        return None
    question = (
        "SELECT EXTRACT(EPOCH FROM clock_timestamp())"
        if url.startswith("postgresql")
        else "SELECT UNIX_TIMESTAMP(SYSDATE(6))"
    )
    engine = make_engine(url)
    try:
        with read(engine) as connection:
            asked_at = time.time()
            there = float(connection.execute(text(question)).scalar_one())
            return there - (asked_at + time.time()) / 2
    except GatewayError:
        return None  # the registry's own finding says so
    finally:
        engine.dispose()
