"""A page of the documentation as a program: its blocks, from top to bottom, in a folder of their own.

| block | what happens |
|---|---|
| `toml NAME`, `text NAME`, any language with a name | the file is written |
| `sh` | the commands are run and must end with 0 |
| `console` | the same for what stands behind `$ `; what is shown below a command must be what it prints |
| `console later` | the same, run again until it prints this |
| `sh terminal` | the command runs on, as in a terminal of its own, until the page ends |
| `text` without a name | what the terminal above prints |
| `sh stop` | the terminal with this command is given its Ctrl-C |
| every other | nothing: it is not meant to be run, and a test lists those |

In what is shown `...` stands for anything; times, hexadecimal values and the number of spaces do not count.
What a page says of ports and hosts is replaced by what is free on this machine, in its blocks and in what is printed.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import psutil

from gateway.cli.recipes import Block, blocks
from gateway.config import load
from gateway.registry import feed
from gateway.registry.database import make_engine, read
from tests.support.gateway import wait_for

__all__ = ["PORTS", "PageRun"]

ROOT: Final = Path(__file__).parents[2]
RUN_S: Final = 60
START_S: Final = 60
LATER_S: Final = 40
PORTS: Final = ("8883", "8884", "9464", "9465", "1883")
"""What pages call the ports of gateways and brokers."""
DEBIAN: Final = (*map(str, Path("/usr/lib/postgresql").glob("*/bin")), "/usr/sbin")
"""Where Debian has programs that are not on the path of a user."""
_OF_THE_MACHINE: Final = re.compile(r"^.*\[warning\] few_open_files .*\n", re.MULTILINE)
_VOLATILE: Final = re.compile(
    r"python3\.\d+|node=\S+|pid=\d+|\d{4}-\d\d-\d\dT[\d:.]+Z|\b[0-9a-f]{12,}\b|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
)


class PageRun:
    """One page, run in `folder`, where `replace` gives what this machine has for what the page says."""

    def __init__(self, page: Path, folder: Path, replace: Mapping[str, str]) -> None:
        self.page = page
        self._folder = folder
        self._here = folder
        self._replace = dict(replace)
        self._terminals: dict[str, subprocess.Popen[bytes]] = {}
        self._gateways: dict[str, tuple[str, Path]] = {}
        """Admin address and configuration of those that run, by their commands."""
        self._environment = os.environ | {
            "PATH": ":".join([str(self._programs()), os.environ["PATH"], *DEBIAN]),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "120",
            "HOME": str(folder),
        }
        for name in (
            "PSKGW_CONFIG",
            "MAKEFLAGS",
            "MAKELEVEL",
        ):  # the page's make is not a part of the tests' make
            self._environment.pop(name, None)

    def run(self) -> None:
        """Every block. Raises AssertionError with the command that did something else than the page says."""
        try:
            for block in blocks(self.page.read_text("utf-8")):
                self._run(block)
        finally:
            for name in list(self._terminals):
                self._close(name)

    def _run(self, block: Block) -> None:
        text = self._here_for(block.text)
        if block.file == "terminal":
            self._open(text.strip())
        elif block.file == "stop":
            self._close(text.strip())
        elif block.language == "text" and not block.file:
            self._check_terminal(block.text)
        elif block.file and block.file != "later":
            (self._here / block.file).write_text(text)
        elif block.language == "sh":
            self._execute(text)
        elif block.language == "console":
            for command, shown in _session(block.text):
                self._check(command, shown, LATER_S if block.file == "later" else 0)

    # Commands

    def _execute(self, command: str, *, fails: bool = False) -> str:
        """Run commands; what they printed. Running gateways then know what changed."""
        where = self._folder / ".where"
        done = subprocess.run(
            ["/bin/bash", "-eu", "-o", "pipefail", "-c", f"{command}\npwd >{shlex.quote(str(where))}"],
            cwd=self._here,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=RUN_S,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, f"{self.page.name}: {command}\n{done.stdout}"
        if not fails:
            self._here = Path(where.read_text().strip())
        for admin, config in self._gateways.values():
            _wait_until_followed(admin, config)
        return done.stdout

    def _check(self, command: str, shown: str, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            printed = self._execute(self._here_for(command), fails=shown.lower().startswith("error: "))
            if not shown or re.fullmatch(_pattern(shown), _steady(self._as_said(printed)), re.DOTALL):
                return
            assert time.monotonic() < deadline, (
                f"{self.page.name} shows for {command}\n{shown}\nand it printed\n{printed}"
            )
            time.sleep(1)

    # Terminals

    def _open(self, command: str) -> None:
        config = self._config_of(command)
        if config is not None and config.exists():
            self._close_what_is_at(_admin(config))
        with (self._folder / "terminals.log").open("ab") as log:
            process = subprocess.Popen(
                ["/bin/bash", "-c", f"exec {command}"],
                cwd=self._here,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._terminals[command] = process
        wait_for(lambda: self._listens(process), START_S, f"{self.page.name}: {command} listens")
        if config is not None:
            admin = _admin(config)
            wait_for(lambda: _ready(admin), START_S, f"{self.page.name}: {command} is ready")
            self._gateways[command] = admin, config

    def _config_of(self, command: str) -> Path | None:
        """The configuration of a gateway; None for every other program."""
        if command == "make run":
            return self._here / "var" / "gateway.toml"
        if command.startswith("gatewayctl run"):
            return self._here / (command.partition("--config ")[2] or "gateway.toml")
        return None

    def _close_what_is_at(self, admin: str) -> None:
        """End the gateway that has these ports, as a reader has to before another can have them."""
        for command, (address, _) in list(self._gateways.items()):
            if address == admin:
                self._close(command)

    def _check_terminal(self, shown: str) -> None:
        log = self._folder / "terminals.log"

        def is_shown() -> bool:
            return (
                re.fullmatch(_pattern(shown), _steady(self._as_said(log.read_text())), re.DOTALL) is not None
            )

        wait_for(is_shown, START_S, f"{self.page.name} shows\n{shown}\nin {log}")

    def _listens(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, (self._folder / "terminals.log").read_text()
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            sockets = [each for one in (parent, *parent.children()) for each in one.net_connections()]
            return any(each.status == psutil.CONN_LISTEN for each in sockets)
        return False

    def _close(self, command: str) -> None:
        self._gateways.pop(command, None)
        process = self._terminals.pop(command)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise

    # This machine

    def _here_for(self, text: str) -> str:
        for said, here in self._replace.items():
            text = text.replace(said, here)
        return text

    def _as_said(self, text: str) -> str:
        for said, here in self._replace.items():
            text = text.replace(here, said)
        return text

    def _programs(self) -> Path:
        """A folder with `gatewayctl`, whose `init` writes the ports of this machine, and `mosquitto`."""
        folder = self._folder / ".bin"
        folder.mkdir()
        ports = " ".join(f"-e s/:{said}/:{here}/" for said, here in self._replace.items() if said in PORTS)
        (folder / "gatewayctl").write_text(
            f'#!/bin/bash\nif [ "$1" != init ]; then exec {sys.executable} -m gateway "$@"; fi\n'
            f'{sys.executable} -m gateway "$@" && sed -i {ports} "$2/gateway.toml"\n'
        )
        (folder / "mosquitto").write_text(
            # Started by root it becomes another user, who cannot read a folder of the tests.
            '#!/bin/bash\n{ cat "$2"; echo "user root"; } >.mosquitto.conf\n'
            f"exec {shutil.which('mosquitto', path='/usr/sbin:/usr/bin:/usr/local/sbin')} -c .mosquitto.conf\n"
        )
        for program in folder.iterdir():
            program.chmod(0o700)
        return folder


def _session(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what is shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        size = next(number for number, line in enumerate(lines, 1) if not line.rstrip().endswith("\\"))
        yield "".join(lines[:size]).strip(), "".join(lines[size:]).strip()


def _steady(text: str) -> str:
    """The text without what differs from run to run."""
    lines = (
        " ".join(line.split())
        for line in _VOLATILE.sub("X", _OF_THE_MACHINE.sub("", text)).strip().splitlines()
    )
    return "\n".join(lines)


def _pattern(shown: str) -> str:
    """What matches a text with `...` in it: a line of its own stands for any lines, or none."""
    parts = [re.escape(part) for part in re.split(r"(?<=\n)\.\.\.\n", _steady(shown))]
    return "(?:.*\n)?".join(part.replace(re.escape("..."), ".*") for part in parts)


def _admin(config: Path) -> str:
    return str(tomllib.loads(config.read_text())["admin"]["bind"])


def _ready(admin: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{admin}/readyz", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _wait_until_followed(admin: str, config: Path) -> None:
    """Wait until a running gateway knows what is in its registry."""
    engine = make_engine(load(config).registry.url)
    try:
        with read(engine) as connection:
            sequence = feed.head(connection).sequence
    finally:
        engine.dispose()
    wait_for(lambda: _revision(admin) >= sequence, what=f"revision {sequence} followed")


def _revision(admin: str) -> float:
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=5) as answer:
        found = re.search(r"^pskgw_registry_revision (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else -1
