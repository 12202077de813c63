"""The machine and the moment, for the head of the report."""

import datetime as dt
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def describe_machine(root: Path) -> Mapping[str, str]:
    """Processor, cores, memory, kernel, system, date and revision of the checkout at `root`."""
    return {
        "Date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Revision": _revision(root),
        "Processor": _processor(),
        "Cores": str(len(os.sched_getaffinity(0))),
        "Memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "System": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
    }


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _revision(root: Path) -> str:
    if shutil.which("git") is None or not (root / ".git").exists():
        return "unknown (no git checkout)"
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    # The report itself is written by the run; a change of it alone leaves the measured code as it was.
    changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)bench/RESULTS.md")
    return f"{revision}, with uncommitted changes" if changed else revision


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("unknown" if done.returncode else "")
