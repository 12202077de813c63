"""The machine and the revision, for the report."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def describe_machine() -> Mapping[str, str]:
    """Processor, cores, memory, kernel and system."""
    return {
        "Processor": _processor(),
        "Cores": str(len(os.sched_getaffinity(0))),
        "Memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "System": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
    }


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def revision(root: Path) -> str:
    """Of the checkout at `root`."""
    if shutil.which("git") is None or not (root / ".git").exists():
        return "unknown (no git checkout)"
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    # What a run writes leaves the measured code as it was.
    written = [f":(exclude)bench/{name}" for name in ("RESULTS.md", "results", "charts")]
    changed = _git(root, "status", "--porcelain", "--", ".", *written)
    return f"{head}, with uncommitted changes" if changed else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("unknown" if done.returncode else "")
