"""What the benchmarks need from Debian: installed when run as root there, else said."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.errors import BenchError

_SBIN = "/usr/sbin:/usr/local/sbin"


def ensure_installed(say: Callable[[str], None]) -> None:
    """Raises BenchError when something is missing and cannot be installed."""
    missing = _missing_packages()
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BenchError(
            f"missing: {', '.join(missing)}; on Debian run `apt-get install {' '.join(missing)}` as root"
        )
    say(f"Installing {', '.join(missing)}")
    _apt_get("update")
    _apt_get("install", "--yes", "--no-install-recommends", *missing)
    still = _missing_packages()
    if still:
        raise BenchError(f"still missing after apt-get: {', '.join(still)}")


def _missing_packages() -> list[str]:
    present = {
        "gcc": shutil.which("cc") is not None,
        "libc6-dev": Path("/usr/include/stdio.h").exists(),
        "libssl-dev": Path("/usr/include/openssl/ssl.h").exists(),
        "mosquitto": _is_there("mosquitto"),
        "stunnel4": _is_there("stunnel4"),
    }
    return [package for package, is_present in present.items() if not is_present]


def _is_there(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SBIN}") is not None


def _apt_get(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", "-qq", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise BenchError(f"apt-get {arguments[0]} failed: {last[0]}")
