"""A real Prometheus scrapes a real gateway: every query of the dashboard has an answer, every rule is evaluated."""

import contextlib
import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.device import RawDevice, add_devices
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for
from tests.support.peers import program, s_client
from tests.support.services import Service, echo, unused_port

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "psk-gateway.json").read_text())
ROUTES = """
[[routes]]
name = "streams"
match = { group = "streams" }
framing = "stream"
backend = "echo"
[[routes]]
name = "spooled"
match = { group = "spooled" }
framing = "lines"
delivery = "spooled"
content_type = "text/plain"
backend = "away"
[[routes]]
name = "readings"
framing = "lines"
content_type = "text/plain"
backend = "events"
"""


class Prometheus:
    """The program, with the configuration and the rules of deploy/ and a scrape every second."""

    def __init__(self, folder: Path, target: str) -> None:
        self.port = unused_port()
        settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        folder.mkdir()
        self._configuration = folder / "prometheus.yml"
        self._configuration.write_text(yaml.safe_dump(settings))
        self._log = folder / "log"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={self._configuration}",
                    f"--storage.tsdb.path={self._configuration.parent / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            wait_for(self._is_ready, 30, f"Prometheus; log: {self._log}")
            yield
        finally:
            process.terminate()
            process.wait(20)

    def ask(self, what: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/api/v1/{what}?{query}", timeout=10
        ) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """What an instant query gives, without those that are not a number."""
        found = [float(each["value"][1]) for each in self.ask("query", query=expression)["result"]]
        return [value for value in found if value == value]  # noqa: PLR0124 - NaN is what differs from itself

    def alerts(self) -> dict[str, str]:
        """Alerts that are not inactive, by name."""
        return {each["labels"]["alertname"]: each["state"] for each in self.ask("alerts")["alerts"]}

    def _is_ready(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return bool(self.values('up{job="psk-gateway"} == 1'))
        return False


def queries() -> dict[str, str]:
    """The queries of the dashboard by panel, with the variables as Grafana would fill them in."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = (
                target["expr"]
                .replace("$__rate_interval", "1m")
                .replace("$job", "psk-gateway")
                .replace("$instance", ".+")
            )
            assert "$" not in expression, expression
            found[f"{panel['id']} {panel['title']} {target['refId']}"] = expression
    return found


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with Service(echo) as service:
        gateway = new_gateway(
            tmp_path / "gateway",
            node="workers = 2",
            routes=ROUTES,
            backends=f'[backends.echo]\nkind = "tcp"\nurl = "{service.url}"\n'
            f'[backends.away]\nkind = "http"\nurl = "http://127.0.0.1:{unused_port()}/"\n',
        )
        with running(gateway):
            yield gateway


def handshake(port: int, device: Device, *options: str) -> None:
    with s_client(port, device, *options) as client:
        client.end_input()
        client.ended()


def traffic(gateway: Gateway, devices: dict[str, Device]) -> None:
    """Some of everything that the dashboard shows, faults included."""
    port = gateway.port()
    handshake(port, devices["reader"], "-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256")
    handshake(port, devices["reader"], "-tls1_3")
    handshake(port, Device("reader", "00" * 32), "-tls1_2")  # wrong_key
    handshake(port, Device("nobody", "00" * 32), "-tls1_3")  # unknown_identity
    with RawDevice(port, devices["reader"]) as reader:
        reader.send(b"21.5\n\xff\n")  # the second is no text: refused
        assert reader.receive_line() == b"ok 1"
        assert reader.receive_line() == b"error 2 invalid"
        gateway.ctl("send-command", "reader", "restart")
        with gateway.registry() as registry:
            registry.set_device_enabled(
                "default", "reader", enabled=False
            )  # a revocation: it ends this session
            wait_for(reader.is_closed, what="the session ends")
            registry.set_device_enabled("default", "reader", enabled=True)
    with RawDevice(port, devices["streamer"]) as streamer:
        streamer.send(b"hello")
        assert streamer.receive_exactly(5) == b"hello"
    with RawDevice(port, devices["spooler"]) as spooler:
        spooler.send(b"22.5\n")
        assert spooler.receive_line() == b"ok 1"
    gateway.wait_until_followed()


def test_every_query_of_the_dashboard_is_answered_with_data(gateway: Gateway, tmp_path: Path) -> None:
    devices = add_devices(gateway, {"reader": None, "streamer": "streams", "spooler": "spooled"})
    gateway.wait_until_followed()
    prometheus = Prometheus(tmp_path / "prometheus", gateway.wait_for_event("admin_listening")["address"])
    with prometheus.running():
        traffic(gateway, devices)
        assert len(prometheus.ask("targets")["activeTargets"]) == 1
        wait_for(
            lambda: prometheus.values('pskgw_messages_received_total{route="spooled"} > 0'), what="a scrape"
        )
        traffic(gateway, devices)  # a rate needs two scrapes with something between them
        unanswered = queries()

        def ask() -> bool:
            for name, expression in list(unanswered.items()):
                if prometheus.values(expression):
                    del unanswered[name]
            return not unanswered

        with contextlib.suppress(AssertionError):
            wait_for(ask, 15)
        assert unanswered == {}

        expected = {
            'pskgw_handshakes_total{outcome="ok", tls_version="TLSv1.2", cipher="PSK-AES128-GCM-SHA256"}',
            'pskgw_handshakes_total{outcome="ok", tls_version="TLSv1.3"}',
            'pskgw_handshakes_total{outcome="wrong_key"}',
            'pskgw_handshakes_total{outcome="unknown_identity"}',
            'pskgw_messages_rejected_total{route="readings", reason="invalid"}',
            'pskgw_messages_delivered_total{route="readings", backend="events"}',
            "pskgw_revocation_seconds_count",
            'pskgw_outbox_oldest_seconds{route="spooled"}',
            'pskgw_backend_duration_seconds_count{backend="away", outcome="error"}',
            'pskgw_workers{state="ready"} == 2',
        }
        assert {each for each in expected if not any(prometheus.values(each))} == set()

        groups = prometheus.ask("rules")["groups"]
        assert [rule["lastError"] for group in groups for rule in group["rules"] if "lastError" in rule] == []
        wait_for(lambda: "PskGatewayBackendDown" in prometheus.alerts(), what="the backend that is away")
        assert (
            set(prometheus.alerts())
            <= {
                "PskGatewayBackendDown",
                "PskGatewayUnknownIdentitySurge",  # one in seven, but three in a minute are more than one in ten seconds
                "PskGatewayWrongKeySurge",
            }
        )
