"""Look for bytes that break a parser: `python -m tests.fuzz TARGET [--seconds 60]`, or `all` for one after the other.

Coverage-guided, with atheris (`pip install 'psk-gateway[fuzz]'`). It begins from the committed corpus; inputs that
reach new code go to `var/fuzz/TARGET`, and `--keep` reduces both to the fewest that reach all of it and commits those to
the corpus folder. What breaks a parser is written to `var/fuzz/TARGET-crash-*`, printed, and ends with status 1.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS

WORK = Path("var/fuzz")
INPUT_BYTES_MAX = 4096
KEPT_BYTES_MAX = 1024
"""Of an input that is committed: a corpus is read, diffed and replayed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="take what was found into the committed corpus")
    options = parser.parse_args()
    failed = False
    for name in TARGETS if options.target == "all" else [options.target]:
        found = WORK / name
        found.mkdir(parents=True, exist_ok=True)
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        failed |= _run(
            name, [f"-max_total_time={options.seconds}", f"-max_len={INPUT_BYTES_MAX}", found, CORPUS / name]
        )
        if options.keep:
            failed |= _reduce(name, found)
    return int(failed)


def _run(name: str, arguments: list[str | Path]) -> bool:
    """libFuzzer on one target. True: it found something."""
    command = [
        sys.executable, "-m", "tests.fuzz.instrumented", name, f"-artifact_prefix={WORK / name}-",
        "-timeout=20", *map(str, arguments),
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode != 0


def _reduce(name: str, found: Path) -> bool:
    """The fewest and smallest inputs that reach all that the old corpus and the new inputs reach.

    Files that somebody gave a name stay: what they show may not be seen in Python's coverage.
    """
    with tempfile.TemporaryDirectory() as folder:
        failed = _run(name, ["-merge=1", f"-max_len={KEPT_BYTES_MAX}", folder, CORPUS / name, found])
        if failed or not any(Path(folder).iterdir()):
            return True
        for path in (CORPUS / name).iterdir():
            if re.fullmatch("[0-9a-f]{40}", path.name):
                path.unlink()
        shutil.copytree(folder, CORPUS / name, dirs_exist_ok=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
