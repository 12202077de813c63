"""HAProxy and nginx take the example files."""

import subprocess
from pathlib import Path

from tests.support.peers import program

DEPLOY = Path(__file__).parents[3] / "deploy"


def run(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_haproxy_takes_the_example() -> None:
    run(program("haproxy"), "-c", "-f", DEPLOY / "haproxy" / "haproxy.cfg")


def test_nginx_takes_the_example(tmp_path: Path) -> None:
    settings = f"pid {tmp_path}/nginx.pid; error_log {tmp_path}/nginx.log;"
    run(program("nginx"), "-t", "-c", DEPLOY / "nginx" / "nginx.conf", "-g", settings)
