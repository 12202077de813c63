"""What the supervisor keeps for workers that start."""

import asyncio
from pathlib import Path

from gateway.cli.run import _supervisor_settings
from gateway.config import load
from gateway.registry.notices import Changed, Published
from gateway.server.supervisor import Supervisor

CONFIGURATION = """
[[listeners]]
name = "tls"
bind = "127.0.0.1:0"
[[routes]]
name = "all"
framing = "lines"
backend = "events"
[backends.events]
kind = "file"
path = "events.jsonl"
"""


def test_what_a_full_disk_kept_from_the_replica_outlives_the_follower(tmp_path: Path) -> None:
    """A follower that starts again publishes a replica that lacks it; only a newer replica has it."""
    (tmp_path / "gateway.toml").write_text(CONFIGURATION)

    async def scenario() -> list[bool]:
        supervisor = Supervisor(_supervisor_settings(load(tmp_path / "gateway.toml", {})))
        overlaid = []
        for notice in (
            Changed(8, ((1, 1),), realms=False, committed_at=0.0, overlay={b"revoked": None}),
            Published("/replica/a", 5),
            Published("/replica/b", 8),
        ):
            await supervisor._from_follower(notice)
            overlaid.append(any("in memory" in text for text in supervisor.degradations))
        return overlaid

    assert asyncio.run(scenario()) == [True, True, False]
