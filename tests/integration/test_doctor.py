"""doctor: a fresh gateway is well, and each thing that is broken is found, with a fix and without a secret."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.backends import LOGIN, WRONG
from tests.support.gateway import Gateway, gatewayctl, new_gateway, running
from tests.support.servers import PASSWORD, USER, Certificates, MosquittoServer, RedisServer, free_port


def doctor(gateway: Gateway) -> tuple[int, list[dict[str, Any]]]:
    done = gateway.ctl("doctor", "--json", check=False)
    assert "Traceback" not in done.stderr
    findings = json.loads(done.stdout)
    assert {frozenset(each) for each in findings} == {frozenset({"check", "status", "detail", "fix"})}
    assert all(each["fix"] for each in findings if each["status"] != "ok")
    assert all("\n" not in each["detail"] + each["fix"] for each in findings)
    return done.returncode, findings


def wrong(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {each["check"]: each["detail"] for each in findings if each["status"] == "error"}


FEW = "connections = 400"
"""Fewer than the default, which takes more open files than some machines allow."""


def test_a_fresh_gateway_is_well(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw", limits=FEW)
    before = sorted(tmp_path.rglob("*"))
    status, findings = doctor(gateway)
    assert status == 0
    assert {each["status"] for each in findings} == {"ok"}
    checks = {
        "configuration",
        "files",
        "disk",
        "open files",
        "admin",
        "registry",
        "master key",
        "replica",
        "ports",
        "clock",
        "tls",
        "backend events",
    }
    assert {each["check"] for each in findings} == checks
    assert sorted(tmp_path.rglob("*")) == before
    assert gateway.ctl("doctor").stdout.count("\n") == len(findings)


def test_a_running_gateway_is_well(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    gateway = new_gateway(tmp_path / "gw")
    text = gateway.config.read_text().replace('bind = "127.0.0.1:0"', f'bind = "127.0.0.1:{ports[0]}"', 1)
    gateway.config.write_text(text)
    with running(gateway):
        status, findings = doctor(gateway)
    assert status == 0, findings
    details = [each["detail"] for each in findings]
    assert f"admin endpoint: 127.0.0.1:{ports[0]} answers" in details
    assert "it can be read, 0 changes behind" in details


def open_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").chmod(0o644)


def other_key(gateway: Gateway) -> None:
    (gateway.directory / "master.key").write_text("ab" * 32)


def no_registry(gateway: Gateway) -> None:
    (gateway.directory / "registry.db").unlink()


def no_schema(gateway: Gateway) -> None:
    (gateway.directory / "registry.db").write_bytes(b"")


def wrong_configuration(gateway: Gateway) -> None:
    gateway.config.write_text("[nodes]\n")


def data_open_to_others(gateway: Gateway) -> None:
    folder = gateway.directory / "data"
    folder.mkdir()
    folder.chmod(0o777)


def no_folder_for_events(gateway: Gateway) -> None:
    gateway.config.write_text(gateway.config.read_text().replace("events.jsonl", "nowhere/events.jsonl"))


@pytest.mark.parametrize(
    ("breaks", "check", "said"),
    [
        (open_key, "master key", "open to others"),
        (other_key, "master key", "does not open this registry"),
        (no_registry, "registry", "registry.db"),
        (no_schema, "registry", "gatewayctl migrate"),
        (wrong_configuration, "configuration", "nodes"),
        (data_open_to_others, "files", "can be written by others"),
        (no_folder_for_events, "backend events", "does not exist"),
    ],
)
def test_what_is_broken(tmp_path: Path, breaks: Callable[[Gateway], None], check: str, said: str) -> None:
    gateway = new_gateway(tmp_path / "gw")
    breaks(gateway)
    status, findings = doctor(gateway)
    assert status == 1
    assert said in wrong(findings)[check]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        gateway.config.write_text(
            gateway.config.read_text().replace('bind = "127.0.0.1:0"', f'bind = "127.0.0.1:{port}"', 1)
        )
        status, findings = doctor(gateway)
    assert status == 1
    assert "Address already in use" in wrong(findings)["ports"]


def test_a_damaged_replica(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw")
    with running(gateway):
        pass
    for file in (gateway.directory / "data" / "replica").rglob("data.mdb"):
        os.truncate(file, 100)
    status, findings = doctor(gateway)
    assert status == 1
    assert "replica" in wrong(findings)


def test_file_modes_are_a_warning(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw", limits=FEW)
    gateway.config.chmod(0o644)
    status, findings = doctor(gateway)
    assert status == 0
    (warning,) = [each for each in findings if each["status"] == "warning"]
    assert warning["fix"] == f"chmod 600 {gateway.config}"


def warnings(findings: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    return {each["check"]: each for each in findings if each["status"] == "warning"}


def test_spools_that_may_outgrow_the_disk_are_a_warning(tmp_path: Path) -> None:
    route = '[[routes]]\nname = "r"\nframing = "lines"\ndelivery = "spooled"\nbackend = "events"\nspool = { bytes_max = 1099511627776 }\n'
    status, findings = doctor(new_gateway(tmp_path / "gw", routes=route))
    assert status == 0
    assert "spools may grow to 1,048,576 MiB" in warnings(findings)["disk"]["detail"]
    assert "lower spool.bytes_max" in warnings(findings)["disk"]["fix"]


def test_too_few_open_files_are_a_warning(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw")
    done = subprocess.run(
        ["prlimit", "--nofile=1000:1000", sys.executable, "-m", "gateway", "doctor", "--json", "--config", gateway.config],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    few = warnings(json.loads(done.stdout))["open files"]
    assert "may open 1,000 files" in few["detail"]
    assert few["fix"].startswith("LimitNOFILE=40128 ")


def test_an_admin_endpoint_for_everybody_is_a_warning(tmp_path: Path) -> None:
    gateway = new_gateway(tmp_path / "gw")
    text = gateway.config.read_text()
    gateway.config.write_text(text.replace('bind = "127.0.0.1:0"', 'bind = "0.0.0.0:0"', 1))
    status, findings = doctor(gateway)
    assert status == 0
    assert warnings(findings)["admin"]["fix"] == "set admin.tls and admin.token, or bind it to 127.0.0.1"


def test_the_certificate_of_the_admin_endpoint(tmp_path: Path) -> None:
    soon = Certificates(tmp_path / "tls")  # good for two days
    files = f'certificate_file = "{soon.server}", key_file = "{soon.server_key}"'
    gateway = new_gateway(tmp_path / "gw", admin=f"tls = {{ {files} }}")
    status, findings = doctor(gateway)
    assert status == 0
    assert "its certificate is good until" in warnings(findings)["admin"]["detail"]
    assert warnings(findings)["files"]["fix"] == f"chmod 600 {soon.server_key}"
    soon.server.write_text("no certificate")
    status, findings = doctor(gateway)
    assert status == 1
    assert "is no certificate in PEM" in wrong(findings)["admin"]


def test_no_configuration(tmp_path: Path) -> None:
    done = gatewayctl("doctor", "--config", tmp_path / "none.toml", "--json", check=False)
    assert done.returncode == 1
    assert wrong(json.loads(done.stdout))


@pytest.mark.parametrize("password", [PASSWORD, WRONG])
def test_backends_with_right_and_wrong_login(tmp_path: Path, password: str) -> None:
    certificates = Certificates(tmp_path / "tls")
    with (
        MosquittoServer(tmp_path / "mosquitto", certificates) as broker,
        RedisServer(tmp_path / "redis", certificates) as redis,
    ):
        (tmp_path / "password").write_text(password)
        login = LOGIN if password == PASSWORD else f"{USER}:{WRONG}"
        gateway = new_gateway(
            tmp_path / "gw",
            backends=f"""
[backends.broker]
kind = "mqtt"
url = "mqtts://127.0.0.1:{broker.tls_port}"
username = "{USER}"
password_file = "{tmp_path / "password"}"
topic = "up/{{device}}"
ca_file = "{certificates.ca}"
cert_file = "{certificates.client}"
key_file = "{certificates.client_key}"
[backends.stream]
kind = "redis"
url = "redis://{login}@127.0.0.1:{redis.port}"
stream = "up"
[backends.away]
kind = "tcp"
url = "tcp://127.0.0.1:{free_port()}"
""",
        )
        status, findings = doctor(gateway)
    assert status == 1
    found = wrong(findings)
    assert "Connection refused" in found["backend away"]
    if password == PASSWORD:
        assert set(found) == {"backend away"}
    else:
        assert "does not accept the user name and password" in found["backend broker"]
        assert "does not accept the user name and password" in found["backend stream"]
    assert WRONG not in json.dumps(findings)
    assert PASSWORD not in json.dumps(findings)
    shutil.rmtree(gateway.directory)
