"""Handshakes that fail, many of them: they are counted in sum and answered later, and refuse nobody who has a right key."""

import dataclasses
import time
from collections.abc import Iterator

import pytest

from gateway.registry.store import NewDevice
from gateway.server.admission.failures import BURST_S
from gateway.server.admission.rates import FREE_FAILURES, PENALTY_FIRST_S
from gateway.tls.openssl import TlsVersion
from tests.support.devices import TLS12, TLS13, End, Refused, TlsDevice
from tests.support.gateway import Device, Gateway, new_gateway, running, wait_for

PER_S, PENALTY_MAX_S = 1, 0.5
LATE_S = 1.0
WRONG_KEY = "5e" * 32
BAD_RECORD_MAC, DECRYPT_ERROR = 20, 51


@dataclasses.dataclass
class Stage:
    """A gateway, and addresses that nobody has used."""

    gateway: Gateway
    device: Device
    port: int
    used: int = 0

    def new_address(self) -> str:
        self.used += 1
        return f"127.1.{self.used}.1"

    def refusal(self, address: str, device: Device, version: TlsVersion = TLS12) -> tuple[Refused, float]:
        """How a handshake was refused, and after how many seconds."""
        began = time.monotonic()
        with pytest.raises(Refused) as refused:
            TlsDevice.connect(self.port, device, address=address, version=version).close()
        return refused.value, time.monotonic() - began

    def count(self, outcome: str) -> int:
        return self.gateway.metric_by("outcome", "pskgw_handshakes_total")[outcome]


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    gateway = new_gateway(
        tmp_path_factory.mktemp("failures") / "gateway",
        limits=f"failures_per_address_per_s = {PER_S}\npenalty_max_s = {PENALTY_MAX_S}\n"
        'exempt_networks = ["127.2.0.0/16"]',
        asyncio_only=request.param == "asyncio",
    )
    (device,) = gateway.add_devices(NewDevice(identity="meter"))
    with running(gateway):
        yield Stage(gateway, device, gateway.port())
        assert gateway.stop() == 0
        assert gateway.complaints() == []


def unknown(number: int) -> Device:
    return Device(f"stranger-{number}", WRONG_KEY)


def check_served(stage: Stage, address: str) -> None:
    """The right key goes in from there, at once."""
    began = time.monotonic()
    with TlsDevice.connect(stage.port, stage.device, address=address) as device:
        device.send(b"served\n")
        assert device.receive_line() == "ok 1"
    assert time.monotonic() - began < LATE_S


@pytest.mark.parametrize(("version", "alert"), [(TLS12, BAD_RECORD_MAC), (TLS13, DECRYPT_ERROR)])
def test_above_the_rate_the_alert_is_the_same_and_a_right_key_goes_in(
    stage: Stage, version: TlsVersion, alert: int
) -> None:
    address = stage.new_address()
    counted, limited = stage.count("unknown_identity"), stage.count("rate_limited")
    tries = 2 * round(PER_S * BURST_S)
    for number in range(tries):
        refused, _ = stage.refusal(address, unknown(number), version)
        assert refused.alert == alert
    check_served(stage, address)
    within = stage.count("unknown_identity") - counted
    assert PER_S * BURST_S <= within < tries
    assert stage.count("rate_limited") - limited == tries - within
    left_out = stage.gateway.wait_for_event("connections_not_logged", timeout_s=15)
    assert left_out["outcomes"]["unknown_identity"] >= 1
    lines = [e for e in stage.gateway.events("handshake_failed") if e["address"] == address]
    assert len(lines) == within


@pytest.mark.parametrize("name", ["known", "unknown"])
def test_an_identity_that_fails_again_waits_and_the_right_key_does_not(stage: Stage, name: str) -> None:
    address = stage.new_address()
    wrong = Device(stage.device.identity if name == "known" else "stranger", WRONG_KEY)
    quick = [stage.refusal(address, wrong) for _ in range(FREE_FAILURES)]
    late = [stage.refusal(address, wrong) for _ in range(3)]
    assert max(seconds for _, seconds in quick) < PENALTY_FIRST_S
    for (_, seconds), least in zip(late, (PENALTY_FIRST_S, PENALTY_MAX_S, PENALTY_MAX_S), strict=True):
        assert least - 0.01 <= seconds < least + LATE_S
    assert {(refused.end, refused.alert) for refused, _ in quick + late} == {(End.ALERT, BAD_RECORD_MAC)}
    check_served(stage, address)  # one device that fails does not lock out its site, and not even itself
    elsewhere, seconds = stage.refusal(stage.new_address(), wrong)
    assert elsewhere.alert == BAD_RECORD_MAC
    assert seconds < PENALTY_FIRST_S
    if name == "known":
        _, seconds = stage.refusal(address, wrong)
        assert seconds < PENALTY_FIRST_S  # the right key was seen since


def test_a_peer_that_does_not_wait_for_its_alert_leaves_nothing_behind(stage: Stage) -> None:
    address = stage.new_address()
    wrong = Device("impatient", WRONG_KEY)
    for _ in range(FREE_FAILURES + 1):
        stage.refusal(address, wrong)
    device = TlsDevice(stage.port, wrong, address=address, version=TLS13)
    failed = stage.count("unknown_identity") + stage.count("rate_limited")
    device.transmit()
    wait_for(
        lambda: stage.count("unknown_identity") + stage.count("rate_limited") > failed, what="the failure"
    )
    device.reset()
    wait_for(lambda: stage.gateway.metric("pskgw_connections") == 0, what="the connection gone")


def test_exempt_networks_neither_wait_nor_are_summed_up(stage: Stage) -> None:
    address = f"127.2.0.{1 + stage.used}"
    wrong = Device("probe", WRONG_KEY)
    counted = stage.count("unknown_identity")
    for _ in range(2 * round(PER_S * BURST_S)):
        _, seconds = stage.refusal(address, wrong)
        assert seconds < PENALTY_FIRST_S
    assert stage.count("unknown_identity") - counted == 2 * round(PER_S * BURST_S)
