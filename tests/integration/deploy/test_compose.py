"""compose.yaml and the Containerfile: well-formed, and their programs run as processes with the very files that are mounted."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_pydantic.models import ComposeSpecification

from tests.support.device import RawDevice
from tests.support.gateway import Gateway, gatewayctl, running
from tests.support.peers import BY_LINES, Peer, program
from tests.support.services import unused_port

ROOT = Path(__file__).parents[3]
COMPOSE = ROOT / "deploy" / "compose"
CONTAINERFILE = (ROOT / "deploy" / "container" / "Containerfile").read_text()


def compose() -> dict[str, Any]:
    """The file, without its own extension fields."""
    found = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return {key: value for key, value in found.items() if not key.startswith("x-")}


def instructions(name: str) -> list[str]:
    """The arguments of one kind of instruction of the Containerfile."""
    joined = CONTAINERFILE.replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def image_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in instructions("ENV") for word in shlex.split(line))


def test_it_is_a_compose_file_whose_mounts_and_names_are_there() -> None:
    found = compose()
    ComposeSpecification.model_validate(found)
    for name, service in found["services"].items():
        assert ("build" in service) or re.search(r":\w", service["image"]), f"{name} has no version"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (COMPOSE / source).exists(), source
            else:
                assert source in found["volumes"]
        assert set(service.get("secrets", [])) <= set(found["secrets"])
        assert set(service.get("depends_on", [])) <= set(found["services"])
    build = found["services"]["gateway"]["build"]
    assert (COMPOSE / build["context"] / build["dockerfile"]).is_file()


def test_the_gateway_may_do_no_more_than_it_needs() -> None:
    for name in ("gateway", "migrate"):
        service = compose()["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert instructions("USER") == ["10001:10001"]
    assert instructions("VOLUME") == [image_environment()["PSKGW_NODE__DATA_DIR"]]


def test_what_grafana_is_given_fits_together() -> None:
    found = compose()["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in found["volumes"] if volume.startswith(".."))
    provisioning = COMPOSE / "../grafana/provisioning"
    (datasource,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert datasource["url"].split("/")[2].split(":")[0] in compose()["services"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "psk-gateway.yml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["../grafana/dashboards"]


def make_secrets(folder: Path) -> Path:
    shutil.copy(COMPOSE / "make-secrets.sh", folder)
    subprocess.run(["sh", "make-secrets.sh"], cwd=folder, check=True, capture_output=True)
    return folder / "secrets"


def test_secrets_are_made_once_and_differ(tmp_path: Path) -> None:
    secrets = make_secrets(tmp_path)
    assert {path.name for path in secrets.iterdir()} == set(compose()["secrets"])
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    values = {path.name: path.read_text() for path in secrets.iterdir()}
    assert len(set(values.values())) == len(values)
    assert values["postgres_password"] in values["registry_url"]
    again = subprocess.run(
        ["sh", "make-secrets.sh"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert again.stderr == "error: secrets is there already: nothing was changed\n"
    assert {path.name: path.read_text() for path in secrets.iterdir()} == values


def test_a_payload_comes_through_gateway_registry_and_broker(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of `migrate`, `gateway` and `mosquitto`, with addresses of this machine in place of the network's."""
    secrets = make_secrets(tmp_path)
    (secrets / "registry_url").write_text(postgres_url)
    broker_port, admin_port = unused_port(), unused_port()
    data = tmp_path / "data"
    data.mkdir(mode=0o777)
    broker = tmp_path / "mosquitto.conf"
    text = (COMPOSE / "mosquitto.conf").read_text()
    text = text.replace("listener 1883", f"listener {broker_port} 127.0.0.1").replace(
        "/mosquitto/data/", f"{data}/"
    )
    broker.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    config = tmp_path / "gateway.toml"
    text = (COMPOSE / "gateway.toml").read_text()
    text = text.replace("/run/secrets", str(secrets)).replace("mosquitto:1883", f"127.0.0.1:{broker_port}")
    config.write_text(text.replace("0.0.0.0:8883", "127.0.0.1:0"))
    services = compose()["services"]
    here = {
        "PATH": os.environ["PATH"],
        "CREDENTIALS_DIRECTORY": str(secrets),
        "PSKGW_CONFIG": str(config),
        "PSKGW_NODE__DATA_DIR": str(tmp_path / "gateway"),
        "PSKGW_NODE__WORKERS": "1",
        "PSKGW_ADMIN__BIND": f"127.0.0.1:{admin_port}",
    }
    for name, value in (image_environment() | services["gateway"]["environment"] | here).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # each `up` runs it again
        gatewayctl(*services["migrate"]["command"])
    gateway = Gateway(tmp_path)
    with Peer(program("mosquitto"), "-c", broker) as mosquitto:
        mosquitto.expect("mosquitto version .* running")
        listen = ("-h", "127.0.0.1", "-p", broker_port, "-t", "realms/#", "-F", "%t %p", "-d")
        with Peer(*BY_LINES, program("mosquitto_sub"), *listen) as subscriber, running(gateway):
            subscriber.expect("Subscribed")
            check_health(admin_port)
            device = gateway.add_device("meter-7")
            gateway.wait_until_followed()
            with RawDevice(gateway.port(), device) as connection:
                connection.send(b"21.5\n")
                assert connection.receive_line() == b"ok 1"
            subscriber.expect("realms/default/devices/meter-7 21.5\n")
            assert gateway.stop() == 0
    with pytest.raises(subprocess.CalledProcessError):
        check_health(admin_port)


def check_health(port: int) -> None:
    """The HEALTHCHECK of the image."""
    (healthcheck,) = instructions("HEALTHCHECK")
    name, *arguments = json.loads(healthcheck[healthcheck.index("[") :])
    assert name == "python"
    here = [argument.replace(":9464", f":{port}") for argument in arguments]
    subprocess.run([sys.executable, *here], check=True, capture_output=True)


def test_the_image_starts_gatewayctl() -> None:
    assert instructions("ENTRYPOINT") == ['["gatewayctl"]']
    assert instructions("CMD") == ['["run"]']


def test_what_the_image_copies_is_all_that_the_package_needs(tmp_path: Path) -> None:
    """A wheel is built of the files that COPY takes, and a gateway is set up by it outside the checkout."""
    source = tmp_path / "src"
    for line in instructions("COPY"):
        if line.startswith("--from"):
            continue
        *names, target = line.split()
        for name in names:
            destination = source / target / (name if target == "./" else "")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, destination, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, destination)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "init", tmp_path / "node"],
        env=environment | {"PYTHONPATH": str(site), "PSKGW_TRACEBACK": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "node" / "registry.db").is_file()
