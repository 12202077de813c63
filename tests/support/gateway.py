"""A real gateway: `gatewayctl init`, a configuration, `gatewayctl run` as a process of its own, on ephemeral ports."""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gateway.config import load
from gateway.registry import feed
from gateway.registry.database import make_engine, read
from gateway.registry.ledger import Author
from gateway.registry.store import NewDevice, Registry

__all__ = ["Device", "Gateway", "gatewayctl", "new_gateway", "running", "wait_for"]

START_S = 30
STOP_S = 20


T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float = 10, what: str = "the condition") -> T:
    """Poll until `condition` gives something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def gatewayctl(
    *args: object,
    check: bool = True,
    input: str | None = None,  # noqa: A002 - as subprocess.run has it
) -> subprocess.CompletedProcess[str]:
    """Run gatewayctl as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *map(str, args)],
        capture_output=True,
        text=True,
        input=input,
        timeout=60,
        check=False,
    )
    assert not check or done.returncode == 0, f"gatewayctl {args}: {done.stderr}"
    return done


@dataclasses.dataclass(frozen=True)
class Device:
    """A registered device."""

    identity: str
    key: str
    """hex"""


class Gateway:
    """One gateway in `directory`; `start` and `stop` as often as needed."""

    def __init__(self, directory: Path, *, asyncio_only: bool = False) -> None:
        self.directory = directory
        self.config = directory / "gateway.toml"
        self.log_path = directory / "log.jsonl"
        self.stdout_path = directory / "stdout"
        self.process: subprocess.Popen[bytes] | None = None
        self.trust: ssl.SSLContext | None = None
        """How `http` trusts an admin endpoint with TLS; None: it is plain HTTP."""
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if asyncio_only:
            # An installation without uvloop: a module of that name that cannot be imported.
            (directory / "without").mkdir(exist_ok=True)
            (directory / "without" / "uvloop.py").write_text("raise ImportError('not installed')\n")
            self._environment["PYTHONPATH"] = os.pathsep.join(
                [str(directory / "without"), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        self._log_start = 0

    def unset(self, variable: str) -> None:
        """Start it without this environment variable."""
        self._environment.pop(variable, None)

    def set(self, **variables: str) -> None:
        """Start it with these environment variables."""
        self._environment |= variables

    def start(self, *, wait: bool = True, prefix: Sequence[str] = ()) -> None:
        """Start it, by the command of `prefix` if given, and wait until it is ready."""
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log, self.stdout_path.open("ab") as stdout:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "gateway", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env=self._environment,
            )
        if wait:
            wait_for(self._is_ready, START_S, f"readiness; log: {self.log_path}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; its exit status."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def lose(self) -> None:
        """Kill all processes at once, as a loss of the machine would."""
        assert self.process is not None
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def kill(self) -> None:
        """End whatever is left of it, at the end of a test."""
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Log lines of this start, all or those of one event."""
        lines = self.log_path.read_bytes()[self._log_start :].splitlines() if self.log_path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [entry for entry in found if event is None or entry["event"] == event]

    def wait_for_event(self, event: str, timeout_s: float = 10, **fields: object) -> dict[str, Any]:
        """The first log line of this event with these fields."""

        def first() -> dict[str, Any] | None:
            matching = (
                e for e in self.events(event) if all(e.get(key) == value for key, value in fields.items())
            )
            return next(matching, None)

        found = wait_for(first, timeout_s, f"log event {event} {fields}")
        assert found is not None
        return found

    def port(self, listener: str = "tls") -> int:
        """The port that the kernel gave a listener."""
        return int(str(self.wait_for_event("listening", listener=listener)["address"]).rpartition(":")[2])

    def admin_url(self) -> str:
        """Where the admin endpoint is."""
        address = self.wait_for_event("admin_listening")["address"]
        return f"{'http' if self.trust is None else 'https'}://{address}"

    def http(self, path: str) -> tuple[int, str]:
        """Status and body of the admin endpoint."""
        try:
            with urllib.request.urlopen(f"{self.admin_url()}{path}", timeout=5, context=self.trust) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with these labels."""
        return sum(
            sample.value
            for sample in self._samples(name)
            if all(sample.labels.get(key) == value for key, value in labels.items())
        )

    def metric_by(self, label: str, name: str) -> Counter[str]:
        """The samples of this name, summed up for each value of a label; those that are 0 left out."""
        sums: Counter[str] = Counter()
        for sample in self._samples(name):
            sums[sample.labels[label]] += int(sample.value)
        return +sums

    def _samples(self, name: str) -> list[Sample]:
        _, text = self.http("/metrics")
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples if sample.name == name]

    def ctl(
        self,
        command: str,
        *args: object,
        check: bool = True,
        input: str | None = None,  # noqa: A002 - as subprocess.run has it
    ) -> subprocess.CompletedProcess[str]:
        """Run gatewayctl on this gateway's configuration."""
        return gatewayctl(command, "--config", self.config, *args, check=check, input=input)

    def add_device(self, identity: str, *args: object) -> Device:
        """`gatewayctl add-device`. One that an earlier try of the same test has left on a gateway of many tests gives way."""
        added = self.ctl("add-device", "--json", *args, "--", identity, check=False)
        if "is taken" in added.stderr:
            realm = args[args.index("--realm") :][:2] if "--realm" in args else ()
            self.ctl("remove-device", *realm, "--", identity)
            added = self.ctl("add-device", "--json", *args, "--", identity)
        assert added.returncode == 0, added.stderr
        shown = json.loads(added.stdout)
        return Device(shown["identity"], shown["key"])

    @contextlib.contextmanager
    def registry(self) -> Iterator[Registry]:
        """The registry, opened in this process."""
        with Registry(load(self.config).registry, Author.of_process()) as registry:
            yield registry

    def add_devices(self, *devices: NewDevice) -> list[Device]:
        """Many devices by the code that `add-device` runs, without a process for each."""
        with self.registry() as registry:
            added = [registry.add_device(device) for device in devices]
        return [Device(device.identity, device.key.hex()) for device in added]

    def wait_until_followed(self) -> None:
        """Wait until what is in the registry is known to the running gateway."""
        engine = make_engine(load(self.config).registry.url)
        try:
            with read(engine) as connection:
                sequence = feed.head(connection).sequence
        finally:
            engine.dispose()
        wait_for(
            lambda: self.metric("pskgw_registry_revision") >= sequence, what=f"revision {sequence} followed"
        )

    def sessions(self) -> list[dict[str, Any]]:
        """`gatewayctl list-sessions`."""
        listed = json.loads(self.ctl("list-sessions", "--json").stdout)
        assert isinstance(listed, list)
        return listed

    def worker_pids(self) -> list[int]:
        """Pids of the worker processes."""
        return self._children("gateway.server.processes.worker")

    def follower_pid(self) -> int:
        """Pid of the follower process; between two of them, of the next."""
        (pid,) = wait_for(lambda: self._children("gateway.server.processes.follower"), what="a follower")
        return pid

    def pids(self) -> list[int]:
        """Pids of all processes of the gateway."""
        assert self.process is not None
        return [self.process.pid, *self._children("gateway.server.")]

    def complaints(self) -> list[str]:
        """What a gateway that is well does not log: errors, tracebacks, warnings of Python."""
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        found = []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                found.append(line)
            else:
                if entry["level"] in ("error", "critical") or "exception" in entry:
                    found.append(line)
        return found

    def output_events(self, file: str = "events.jsonl") -> list[dict[str, Any]]:
        """CloudEvents that arrived in the file backend `events`, or in another one's file."""
        path = self.directory / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _children(self, module: str) -> list[int]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = []
        for pid in children:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if module in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(int(pid))
        return found

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the gateway ended: {self.log_path.read_text()}"
        if not self.events("admin_listening"):
            return False
        return self.http("/readyz")[0] == 200


def new_gateway(
    directory: Path,
    *,
    routes: str = "",
    backends: str = "",
    limits: str = "",
    node: str = "",
    admin: str = "",
    listener: str = "",
    registry_url: str = "",
    registry: str = "",
    asyncio_only: bool = False,
) -> Gateway:
    """An initialised gateway on ephemeral ports, not started. TOML pieces replace or add to what `init` wrote.

    Without `routes` there is the one of `init`: lines, text/plain, acknowledged, to events.jsonl.
    """
    shutil.copytree(_initialised(), directory)
    gateway = Gateway(directory, asyncio_only=asyncio_only)
    initial = tomllib.loads(gateway.config.read_text())
    url = registry_url or initial["registry"]["url"]
    routes = routes or (
        '[[routes]]\nname = "lines"\nframing = "lines"\ncontent_type = "text/plain"\nack = true\nbackend = "events"\n'
    )
    text = f"""
[node]
data_dir = "data"
drain_s = 3
{node}
[registry]
url = "{url}"
master_key_file = "master.key"
{registry}
[limits]
{limits}
[admin]
bind = "127.0.0.1:0"
{admin}
[log]
level = "debug"
format = "json"
[[listeners]]
name = "tls"
bind = "127.0.0.1:0"
{listener}
{routes}
[backends.events]
kind = "file"
path = "events.jsonl"
{backends}
"""
    gateway.config.write_text(re.sub(r"\n+", "\n", text))
    return gateway


@functools.cache
def _initialised() -> Path:
    """What `gatewayctl init` writes, made once: each gateway gets a copy."""
    folder = tempfile.TemporaryDirectory(prefix="pskgw-initialised-")
    atexit.register(folder.cleanup)
    directory = Path(folder.name) / "gateway"
    gatewayctl("init", directory)
    return directory


@contextlib.contextmanager
def running(gateway: Gateway, *, wait: bool = True) -> Iterator[Gateway]:
    """Start it, and end it whatever happens."""
    try:
        gateway.start(wait=wait)
        yield gateway
    finally:
        gateway.kill()
