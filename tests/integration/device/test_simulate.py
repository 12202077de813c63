"""`gatewayctl simulate` against a real gateway: what it counts is what the gateway counts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.registry.store import NewDevice
from tests.integration.device.conftest import private
from tests.support.gateway import Gateway, gatewayctl, new_gateway, running

DEVICES = 60


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path]]:
    folder = tmp_path_factory.mktemp("simulate")
    gateway = new_gateway(folder / "gateway", limits="handshake_timeout_s = 2\n")
    devices = gateway.add_devices(*(NewDevice(identity=f"sim:{number}") for number in range(DEVICES)))
    keys = private(folder / "keys", "# a fleet\n" + "".join(f"{one.identity}:{one.key}\n" for one in devices))
    with running(gateway):
        yield gateway, keys


def messages_received(gateway: Gateway) -> float:
    return gateway.metric("pskgw_messages_received_total")


def handshakes_done(gateway: Gateway) -> float:
    return gateway.metric("pskgw_handshakes_total", outcome="ok")


def test_a_fleet_with_churn_and_bad_actors(
    fleet: tuple[Gateway, Path], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    gateway, keys = fleet
    metrics = tmp_path / "fleet.prom"
    received, accepted = messages_received(gateway), handshakes_done(gateway)
    written = len(gateway.output_events())
    done = gatewayctl(
        "simulate", f"127.0.0.1:{gateway.port()}", "--keys", keys, "--processes", 2, "--duration", 4, "--rate", 60,
        "--interval", 0.2, "--size-spread", "uniform", "--churn", 1.5, "--prometheus", metrics, "--json",
        "--wrong-key", 2, "--unknown", 2, "--slow", 2, "--silent", 2,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["devices"] == DEVICES
    assert report["sessions"] == 0
    assert report["handshakes"] > DEVICES
    assert report["sessions_ended"] == report["handshakes"]
    assert (report["sessions_cut"], report["unanswered"], report["refused"]) == (0, 0, {})
    assert report["acknowledged"] == report["messages"] > 100
    assert report["handshake"]["count"] == report["handshakes"]
    assert 0 < report["answer"]["p50_s"] <= report["answer"]["p99_s"] <= report["answer"]["longest_s"]
    assert set(report["bad"]) == {"wrong-key", "unknown", "slow", "silent"}
    assert report["bad_admitted"] == 0

    # What the gateway says of it
    assert messages_received(gateway) - received == report["messages"]
    assert handshakes_done(gateway) - accepted == report["handshakes"]
    assert gateway.metric("pskgw_handshakes_total", outcome="wrong_key") >= report["bad"]["wrong-key"]
    assert len(gateway.output_events()) - written == report["messages"]
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.read_text())
        for sample in family.samples
    }
    assert samples["pskgw_simulate_acknowledged_total"] == report["acknowledged"]
    measured(
        f"{report['messages']} messages, {report['cpu_s']:.1f} s of CPU, {report['memory_bytes'] >> 20} MiB"
    )


def test_a_storm_of_sessions_that_say_nothing(fleet: tuple[Gateway, Path]) -> None:
    gateway, keys = fleet
    done = gatewayctl(
        "simulate", f"127.0.0.1:{gateway.port()}", "--keys", keys, "--devices", 50, "--duration", 2, "--interval", 0,
        "--tls", "1.2", "--processes", 1,
    )  # fmt: skip
    assert "50 open" in done.stdout or "50 at most" in done.stdout
    assert "0 sent" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max-answer-p99", "0.001"], "p99 of answers is"),
        (["--max-handshake-p99", "0.001"], "p99 of handshakes is"),
    ],
)
def test_a_bound_that_does_not_hold_is_status_1(
    fleet: tuple[Gateway, Path], arguments: list[str], complaint: str
) -> None:
    gateway, keys = fleet
    done = gatewayctl(
        "simulate", f"127.0.0.1:{gateway.port()}", "--keys", keys, "--duration", 1, "--interval", "0.1", "--devices", 5,
        *arguments, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert complaint in done.stderr
    assert "answers" in done.stdout  # the figures stand there all the same


def test_a_gateway_that_is_away(tmp_path: Path) -> None:
    keys = private(tmp_path / "keys", f"a:{'00' * 16}\n")
    done = gatewayctl("simulate", "127.0.0.1:9", "--keys", keys, "--duration", 0.5, check=False)
    assert done.returncode == 1
    assert "no device came in" in done.stderr
    assert "is the gateway running there?" in done.stderr


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        ("a:zz\n", 0o600, "not hex"),
        ("no colon\n", 0o600, "line 1: write identity:hex"),
        ("", 0o600, "has no device"),
        (f"a:{'00' * 16}\n", 0o644, "can be read by others"),
        (f"a:{'00' * 16}\n", 0o600, "has 1 devices, 5 are asked for"),
    ],
)
def test_bad_lists_of_keys(tmp_path: Path, text: str, mode: int, complaint: str) -> None:
    keys = private(tmp_path / "keys", text)
    keys.chmod(mode)
    arguments = ["--devices", "5"] if "asked" in complaint else []
    done = gatewayctl("simulate", "127.0.0.1:9", "--keys", keys, *arguments, check=False)
    assert done.returncode == 1
    assert complaint in done.stderr
