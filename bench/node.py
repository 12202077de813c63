"""The gateway under test, as shipped: configuration of `gatewayctl init`, one worker, everything switched on.

Changed by environment are addresses, the realm of the listener, and where registry and data are, since they are kept
between runs. What `init` wrote stays: profile, route (lines to a file, acknowledged), limits, log level.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path

from bench.errors import BenchError
from bench.peers import Running, free_port, stopped_on_failure
from bench.processes import Server, start_server
from bench.registry import REALM, Node

GATEWAY = "Gateway"
_START_S = 600.0
"""The first start copies the whole registry."""


class Gateway:
    """`gatewayctl run` on a registry of the whole fleet."""

    def __init__(
        self,
        folder: Path,
        node: Node,
        cpus: frozenset[int],
        root: Path,
        *,
        name: str = GATEWAY,
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`folder` is made, and is this one's alone; `settings` are further variables of the environment."""
        folder.mkdir(exist_ok=True)
        self.name = name
        self.ready_s = 0.0
        """From its last start until it was ready."""
        self._workers = workers
        self._settings = settings or {}
        self._folder = folder
        self._node = node
        self._cpus = cpus
        self._root = root

    def start(self) -> Running:
        pristine, home = self._folder / "initial", self._folder / "gateway"
        if not pristine.exists():
            self._init(pristine)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(pristine, home)
        port, admin_port = free_port(), free_port()
        began = time.monotonic()
        server = start_server(
            [sys.executable, "-m", "gateway", "run", "--config", str(home / "gateway.toml")],
            log=self._folder / "gateway.log",
            cpus=frozenset(os.sched_getaffinity(0)),  # three programs that read what they are made of
            cwd=self._root,
            env=self._environment(port, admin_port),
        )
        with stopped_on_failure(server):
            _wait_until_ready(server, admin_port)
            self.ready_s = time.monotonic() - began
            server.pin(self._cpus)
        return Running(self.name, f"127.0.0.1:{port}", self._node.devices, server)

    def versions(self) -> Mapping[str, str]:
        from cryptography.hazmat.backends.openssl import backend

        packages = ("pyOpenSSL", "cryptography", "uvloop", "lmdb", "SQLAlchemy", "msgspec")
        return {
            "Python": sys.version.split()[0],
            "OpenSSL of the gateway": backend.openssl_version_text(),
            **{package: metadata.version(package) for package in packages},
            "SQLite": sqlite3.sqlite_version,
        }

    def _init(self, home: Path) -> None:
        argv = [sys.executable, "-m", "gateway", "init", str(home)]
        done = subprocess.run(argv, cwd=self._root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"`gatewayctl init` failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}")

    def _environment(self, port: int, admin_port: int) -> dict[str, str]:
        listener = {"name": "tls", "bind": f"127.0.0.1:{port}", "realm": REALM, "profile": "compatible"}
        return {
            "PSKGW_NODE__WORKERS": str(self._workers),
            "PSKGW_NODE__DATA_DIR": str(self._node.data_dir),
            "PSKGW_REGISTRY__URL": self._node.registry_url,
            "PSKGW_REGISTRY__MASTER_KEY_FILE": str(self._node.master_key_file),
            "PSKGW_ADMIN__BIND": f"127.0.0.1:{admin_port}",
            "PSKGW_LISTENERS": json.dumps([listener]),
            **self._settings,
        }


def stream_settings(service_port: int) -> Mapping[str, str]:
    """Settings with which sessions are bytes both ways to a TCP service on this machine."""
    service = {"kind": "tcp", "url": f"tcp://127.0.0.1:{service_port}"}
    return {
        "PSKGW_ROUTES": json.dumps([{"name": "stream", "framing": "stream", "backend": "service"}]),
        "PSKGW_BACKENDS": json.dumps({"service": service}),
    }


def _wait_until_ready(server: Server, admin_port: int) -> None:
    deadline = time.monotonic() + _START_S
    url = f"http://127.0.0.1:{admin_port}/readyz"
    while time.monotonic() < deadline:
        server.check_alive()
        if _is_ready(url):
            return
        time.sleep(0.02)
    raise BenchError(f"the gateway is not ready after {_START_S:.0f} s: {server.last_words()}")


def _is_ready(url: str) -> bool:
    try:
        with closing(urllib.request.urlopen(url, timeout=2)) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):  # not listening yet, or 503 while it copies
        return False
