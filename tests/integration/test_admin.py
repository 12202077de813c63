"""The admin endpoint as a scraper sees it: TLS, token, OpenMetrics; and a real Prometheus that uses all of them."""

import contextlib
import json
import resource
import ssl
import statistics
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.devices import TLS12, TlsDevice
from tests.support.gateway import Gateway, new_gateway, running, wait_for
from tests.support.peers import program
from tests.support.servers import Certificates, free_port

TOKEN = "a-token-of-more-than-16"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
"""What Prometheus 2.42 sends."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def tls(certificates: Certificates, more: str = "") -> str:
    return f'tls = {{ certificate_file = "{certificates.server}", key_file = "{certificates.server_key}"{more} }}'


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[Gateway]:
    """A gateway whose admin endpoint has TLS and a token, from a file."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(TOKEN + "\n")
    gateway = new_gateway(folder / "gw", admin=f'{tls(certificates)}\ntoken_file = "{folder}/token"')
    gateway.trust = ssl.create_default_context(cafile=certificates.ca)
    with running(gateway):
        yield gateway


def metrics(gateway: Gateway, **headers: str) -> tuple[int, str, str]:
    """Status, content type and body of /metrics."""
    request = urllib.request.Request(f"{gateway.admin_url()}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5, context=gateway.trust) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.headers["WWW-Authenticate"], exc.read().decode()


def test_metrics_need_the_token_and_probes_do_not(guarded: Gateway) -> None:
    assert guarded.http("/healthz") == (200, '{"status": "alive"}')
    assert guarded.http("/readyz")[0] == 200
    for wrong in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {TOKEN}"},
                  {"Authorization": TOKEN}, {"Authorization": "Bearer "}):  # fmt: skip
        status, challenge, body = metrics(guarded, **wrong)
        assert (status, challenge) == (401, "Bearer")
        assert "pskgw_" not in body
        assert TOKEN not in body
    status, _, body = metrics(guarded, Authorization=f"bearer {TOKEN}")
    assert status == 200
    assert "pskgw_build_info" in body


def test_openmetrics_for_whom_it_is_asked(guarded: Gateway) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    _, kind, body = metrics(guarded, Accept=OPENMETRICS, **bearer)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith("# EOF\n")
    families = {
        family.name
        for family in text_string_to_metric_families(body)  # type: ignore[no-untyped-call]  # prometheus_client has it untyped
    }
    assert {"pskgw_build_info", "pskgw_lookups", "process_cpu_seconds"} <= families
    _, kind, body = metrics(guarded, Accept="text/plain", **bearer)
    assert kind.startswith("text/plain")
    assert "# EOF" not in body


def test_the_token_is_shown_nowhere(guarded: Gateway) -> None:
    assert TOKEN not in guarded.ctl("check-config").stdout + guarded.ctl("check-config", "--json").stdout
    assert TOKEN not in guarded.log_path.read_text()
    assert TOKEN not in guarded.ctl("doctor").stdout


def test_without_tls_a_tls_endpoint_answers_nobody(guarded: Gateway) -> None:
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"{guarded.admin_url()}/healthz".replace("https", "http"), timeout=5)


def test_a_client_certificate_is_asked_for(tmp_path: Path, certificates: Certificates) -> None:
    gateway = new_gateway(tmp_path / "gw", admin=tls(certificates, f', client_ca_file = "{certificates.ca}"'))
    gateway.trust = ssl.create_default_context(cafile=certificates.ca)
    gateway.trust.load_cert_chain(certificates.client, certificates.client_key)
    with running(gateway):
        assert metrics(gateway)[0] == 200
        gateway.trust = ssl.create_default_context(cafile=certificates.ca)
        with pytest.raises((urllib.error.URLError, OSError)):
            metrics(gateway)


def test_a_renewed_certificate_is_taken(tmp_path: Path, certificates: Certificates) -> None:
    renewed = Certificates(tmp_path / "renewed")
    mine = [tmp_path / "admin.pem", tmp_path / "admin.key"]
    mine[0].write_bytes(certificates.server.read_bytes())
    mine[1].write_bytes(certificates.server_key.read_bytes())
    gateway = new_gateway(
        tmp_path / "gw", admin=f'tls = {{ certificate_file = "{mine[0]}", key_file = "{mine[1]}" }}'
    )
    old, gateway.trust = ssl.create_default_context(cafile=certificates.ca), ssl.create_default_context()
    gateway.trust.load_verify_locations(certificates.ca)
    gateway.trust.load_verify_locations(renewed.ca)
    with running(gateway):
        for file, source in zip(mine, (renewed.server, renewed.server_key), strict=True):
            (tmp_path / "new").write_bytes(source.read_bytes())
            (tmp_path / "new").replace(file)
        assert metrics(gateway)[0] == 200
        gateway.trust = old
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            metrics(gateway)
        gateway.trust = ssl.create_default_context(cafile=renewed.ca)
        assert metrics(gateway)[0] == 200


@pytest.mark.parametrize(
    ("admin", "said"),
    [
        ('tls = { certificate_file = "none.pem", key_file = "none.key" }', "none.pem cannot be read"),
        ('tls = { certificate_file = "master.key", key_file = "master.key" }', "are no certificate"),
        ('token = "short"', "admin.token: must have 16 or more"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(tmp_path: Path, admin: str, said: str) -> None:
    gateway = new_gateway(tmp_path / "gw", admin=admin)
    done = gateway.ctl("run", check=False)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("bind", "admin", "lacks"),
    [
        ("127.0.0.1", "", None),
        ("0.0.0.0", "", "admin.tls and admin.token"),
        ("0.0.0.0", f'token = "{TOKEN}"', "admin.tls"),
        ("0.0.0.0", "tls", "admin.token"),
        ("0.0.0.0", f'tls\ntoken = "{TOKEN}"', None),
    ],
)
def test_an_open_endpoint_is_warned_of(
    tmp_path: Path, certificates: Certificates, bind: str, admin: str, lacks: str | None
) -> None:
    gateway = new_gateway(tmp_path / "gw", admin=admin.replace("tls", tls(certificates), 1))
    text = gateway.config.read_text()
    gateway.config.write_text(text.replace('bind = "127.0.0.1:0"', f'bind = "{bind}:0"', 1))
    with running_without_asking(gateway):
        gateway.wait_for_event("started")
        warnings = gateway.events("admin_is_open")
    assert bool(warnings) == (lacks is not None)
    if lacks is not None:
        assert f"set {lacks}, or bind it to 127.0.0.1" in warnings[0]["note"]


@contextlib.contextmanager
def running_without_asking(gateway: Gateway) -> Iterator[None]:
    try:
        gateway.start(wait=False)
        yield
    finally:
        gateway.kill()


def test_prometheus_scrapes_with_tls_and_token(
    guarded: Gateway, certificates: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    target = guarded.admin_url().removeprefix("https://")
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(
        f"""
global: {{ scrape_interval: 1s }}
scrape_configs:
  - job_name: psk-gateway
    scheme: https
    authorization: {{ credentials_file: {tmp_path}/token }}
    tls_config: {{ ca_file: {certificates.ca} }}
    static_configs: [{{ targets: ["{target}"] }}]
"""
    )
    subprocess.run([program("promtool"), "check", "config", configuration], check=True, capture_output=True)
    port = free_port()
    with prometheus(configuration, tmp_path / "data", port):

        def scraped() -> dict[str, Any] | None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': 'pskgw_build_info * on() up'})}",
                    timeout=5,
                ) as answer,
            ):
                result = json.load(answer)["data"]["result"]
                return result[0] if result else None
            return None

        sample = wait_for(scraped, 30, "a scrape")
    assert sample is not None
    assert sample["value"][1] == "1"


@contextlib.contextmanager
def prometheus(configuration: Path, data: Path, port: int) -> Iterator[None]:
    with (configuration.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={data}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def test_a_bad_accept_header_gets_text(guarded: Gateway) -> None:
    status, kind, _ = metrics(guarded, Accept="\u00ff;q=x", Authorization=f"Bearer {TOKEN}")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")


@pytest.mark.parametrize(
    "sessions", [300, pytest.param(10_000, marks=[pytest.mark.prove, pytest.mark.timeout(600)])]
)
def test_a_scrape_and_a_listing_with_many_sessions(
    tmp_path: Path, sessions: int, measured: Callable[[str], None]
) -> None:
    bounds = "connections = 15000\nconnections_per_address = 15000\nfirst_message_timeout_s = 3600"
    gateway = new_gateway(tmp_path / "gw", node="workers = 2", limits=bounds)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        stack.enter_context(running(gateway))
        device = gateway.add_device("many")
        gateway.wait_until_followed()
        stack.enter_context(TlsDevice.connect(gateway.port(), device, version=TLS12))
        few = len(metrics(gateway)[2].splitlines())
        for _ in range(sessions - 1):
            stack.enter_context(TlsDevice.connect(gateway.port(), device, version=TLS12))
        durations = []
        for _ in range(20):
            began = time.perf_counter()
            _, _, body = metrics(gateway)
            durations.append(time.perf_counter() - began)
        assert gateway.metric("pskgw_connections") == sessions
        assert len(body.splitlines()) <= few + 40, "samples of the other worker, and none of a session"
        began = time.perf_counter()
        assert len(gateway.sessions()) == sessions
        listing_s = time.perf_counter() - began
    median_ms = 1000 * statistics.median(durations)
    measured(f"{sessions} sessions: /metrics {median_ms:.1f} ms, list-sessions --json {listing_s:.1f} s")
    assert median_ms < 50
