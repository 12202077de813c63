"""The Helm chart: rendered with Go's templates, held to the schemas of Kubernetes, and its containers' commands run as processes.

Where Python is new enough for Helm's own library from PyPI, `helm lint` looks at every variant, too.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.gateway import Gateway, gatewayctl, running
from tests.support.peers import program
from tests.support.services import unused_port

CHART = Path(__file__).parents[3] / "deploy" / "helm" / "psk-gateway"
RENDERER = Path(__file__).with_name("render.go")
VERSIONS = ("1.27", "1.34")
VARIANTS: dict[str, dict[str, Any]] = {
    "as-it-is": {},
    "spooled": {"spooled": True, "persistence": {"size": "100Gi", "storageClass": "fast"}, "replicas": 3},
    "everything": {
        "image": {"repository": "images.example/psk-gateway", "tag": "v1", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "pull"}],
        "service": {
            "type": "ClusterIP",
            "port": 443,
            "annotations": {"example.org/pool": "devices"},
            "externalTrafficPolicy": "Local",
            "loadBalancerSourceRanges": ["192.0.2.0/24"],
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "5s"},
        "networkPolicy": {
            "enabled": True,
            "devicesFrom": ["192.0.2.0/24", "2001:db8::/32"],
            "metricsFrom": {"a": "b"},
        },
        "nodeSelector": {"pool": "edge"},
        "tolerations": [{"key": "edge", "operator": "Exists"}],
        "podAnnotations": {"example.org/team": "fleet"},
    },
    "bare": {"networkPolicy": {"enabled": False, "devicesFrom": [], "metricsFrom": {}}},
}


def chart_values(variant: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return values | VARIANTS[variant]


def values_schema() -> Any:
    return json.loads((CHART / "values.schema.json").read_text())


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of `render.go`."""
    folder = tmp_path_factory.mktemp("renderer")
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    subprocess.run([program("go"), "build", "-o", folder / "render", RENDERER], check=True, env=environment)
    return folder / "render"


def render(renderer: Path, variant: str, release: str = "edge") -> list[dict[str, Any]]:
    """The objects of the chart, as `helm template` would give them."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    objects = {
        "Values": chart_values(variant),
        "Release": {"Name": release, "Namespace": "fleet", "Service": "Helm"},
        "Chart": {"Name": chart["name"], "Version": chart["version"], "AppVersion": str(chart["appVersion"])},
    }
    templates = {
        path.name: path.read_text() for path in (CHART / "templates").iterdir() if path.suffix != ".txt"
    }
    done = subprocess.run(
        [renderer],
        input=json.dumps({"Objects": objects, "Templates": templates}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The first of its kind."""
    return next(each for each in objects if each["kind"] == kind)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_rendered_is_what_kubernetes_takes(renderer: Path, variant: str) -> None:
    objects = render(renderer, variant)
    for each in objects:
        if each["kind"] == "ServiceMonitor":  # the operator's own, which has no schema there
            assert set(each["spec"]) == {"selector", "endpoints"}
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(each, version, strict=True)
    kinds = sorted(each["kind"] for each in objects)
    expected = ["ConfigMap", "ConfigMap", "Job", "PodDisruptionBudget", "Service", "Service"]
    expected.append("StatefulSet" if variant == "spooled" else "Deployment")
    expected += ["ServiceMonitor"] if variant == "everything" else []
    expected += [] if variant == "bare" else ["NetworkPolicy"]
    assert kinds == sorted(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_selectors_choose_the_gateways_and_nothing_else(renderer: Path, variant: str) -> None:
    objects = render(renderer, variant)
    workload = of_kind(objects, "StatefulSet" if variant == "spooled" else "Deployment")
    labels = workload["spec"]["template"]["metadata"]["labels"]
    job = of_kind(objects, "Job")["spec"]["template"]["metadata"]["labels"]
    selectors = [workload["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"] for each in objects if each["kind"] == "Service"]
    selectors.append(of_kind(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= job.items()
    if variant == "everything":
        admin = next(each for each in objects if each["metadata"]["name"].endswith("-admin"))
        monitor = of_kind(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
        assert monitor.items() <= admin["metadata"]["labels"].items()


def test_a_spooled_gateway_has_a_volume_of_its_own(renderer: Path) -> None:
    spooled = of_kind(render(renderer, "spooled"), "StatefulSet")["spec"]
    assert [claim["metadata"]["name"] for claim in spooled["volumeClaimTemplates"]] == ["data"]
    assert "data" not in [volume["name"] for volume in spooled["template"]["spec"]["volumes"]]
    plain = of_kind(render(renderer, "as-it-is"), "Deployment")["spec"]["template"]["spec"]
    assert {"name": "data", "emptyDir": {}} in plain["volumes"]
    names = [each["metadata"]["name"] for each in render(renderer, "spooled")]
    assert spooled["serviceName"] in names


def test_no_container_may_do_more_than_it_needs(renderer: Path) -> None:
    objects = render(renderer, "as-it-is")
    for kind in ("Deployment", "Job"):
        pod = of_kind(objects, kind)["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_fit_their_schema(variant: str) -> None:
    jsonschema.Draft7Validator.check_schema(values_schema())
    jsonschema.validate(chart_values(variant), values_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 0},
        {"spooled": "yes"},
        {"existingSecret": ""},
        {"config": "[node]\nworkers = 1\n"},
        {"service": {"type": "loadbalancer"}},
        {"networkPolicy": {"enabled": True, "devicesFrom": ["everywhere"], "metricsFrom": {}}},
        {"replicaCount": 3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_values_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(chart_values("as-it-is") | wrong, values_schema())


@pytest.mark.prove
@pytest.mark.skipif(sys.version_info < (3, 12), reason="Helm's library needs Python 3.12")
@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_itself_finds_nothing_wrong(tmp_path: Path, variant: str) -> None:
    helm = pytest.importorskip("helm_sdkpy", reason="Helm's library is not there for this machine")
    shutil.copytree(CHART, tmp_path / "psk-gateway")
    (tmp_path / "psk-gateway" / "values.yaml").write_text(yaml.safe_dump(chart_values(variant)))
    found = asyncio.run(helm.Lint(helm.Configuration()).run(str(tmp_path / "psk-gateway")))
    assert found["Errors"] is None, found
    assert [each for each in found["Messages"] if each["Severity"] > 1] == []  # 1: an icon is recommended


def container_environment(container: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The environment of a container, with its mounts below `folder`."""
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    found = {}
    for each in container["env"]:
        value = str(each["value"])
        is_mounted = any(value == mount or value.startswith(mount + "/") for mount in mounts)
        found[each["name"]] = str(folder / value.lstrip("/")) if is_mounted else value
    return found


def test_the_commands_of_its_containers_run_on_a_real_registry(
    renderer: Path, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The migration first, then the gateway, each with the configuration, secrets and environment that are rendered."""
    objects = render(renderer, "as-it-is")
    config = tmp_path / "etc" / "psk-gateway" / "gateway.toml"
    config.parent.mkdir(parents=True)
    text = of_kind(objects, "ConfigMap")["data"]["gateway.toml"]
    config.write_text(text.replace('"0.0.0.0:8883"', '"127.0.0.1:0"'))
    secrets = tmp_path / "run" / "secrets" / "psk-gateway"
    secrets.mkdir(parents=True)
    (secrets / "master.key").write_text("5a" * 32)
    (secrets / "master.key").chmod(0o440)  # as Kubernetes mounts it
    (secrets / "registry_url").write_text(postgres_url)
    (tmp_path / "var" / "lib" / "psk-gateway").mkdir(parents=True)

    (migrate,) = of_kind(objects, "Job")["spec"]["template"]["spec"]["containers"]
    (run,) = of_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container_environment(migrate, tmp_path) == container_environment(run, tmp_path)
    here = {
        "PSKGW_CONFIG": str(config),
        "PSKGW_ADMIN__BIND": f"127.0.0.1:{unused_port()}",
        "PSKGW_NODE__DRAIN_S": "2",
    }
    for name, value in (container_environment(run, tmp_path) | here).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # an upgrade runs it again
        gatewayctl(*migrate["args"])
    assert run["args"] == ["run"]
    with running(Gateway(config.parent)) as gateway:
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            assert gateway.http(run[probe]["httpGet"]["path"])[0] == 200, probe
        assert gateway.stop() == 0
