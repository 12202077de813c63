"""Whoever is refused learns nothing: not from the alert, not from its bytes, not from the time it takes."""

import dataclasses
import datetime as dt
import random
import statistics
import time
from collections.abc import Callable, Iterator

import pytest

from gateway.registry.store import NewDevice
from gateway.tls.openssl import TlsVersion
from tests.support.devices import TLS12, TLS13, TlsDevice
from tests.support.effect_size import cliffs_delta
from tests.support.gateway import Device, Gateway, new_gateway, running

TRIES, PROVE_TRIES = 200, 2_000
DELTA_MAX = 0.147
"""Of Cliff's delta: below it a difference is called negligible (Romano et al. 2006). In the short run, noise alone may reach
three times its own deviation more."""
HOUR = dt.timedelta(hours=1)
WRONG_KEY = "5e" * 32
ALERTS = {TLS12: bytes.fromhex("15030300020214"), TLS13: bytes.fromhex("15030300020233")}


@dataclasses.dataclass
class Stage:
    gateway: Gateway
    port: int
    devices: dict[str, Device]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    gateway = new_gateway(
        tmp_path_factory.mktemp("timing") / "gateway", limits='exempt_networks = ["127.0.0.1"]'
    )
    now = dt.datetime.now(dt.UTC)
    names = ("wrong_key", "disabled", "expired", "address_refused", "revoked", "wrong_hash")
    gateway.add_devices(
        NewDevice(identity="wrong_key"),
        NewDevice(identity="disabled"),
        NewDevice(identity="expired", not_before=now - 2 * HOUR, not_after=now - HOUR),
        NewDevice(identity="address_refused", networks=("10.0.0.0/8",)),
        NewDevice(identity="revoked"),
        NewDevice(identity="wrong_hash", hash="sha384"),
        *(NewDevice(identity=f"other-{number}") for number in range(500)),
    )
    with gateway.registry() as registry:
        registry.set_device_enabled("default", "disabled", enabled=False)
        registry.revoke_key("default", "revoked")
    with running(gateway):
        devices = {name: Device(name, WRONG_KEY) for name in names}
        devices["unknown_identity"] = Device("stranger", WRONG_KEY)
        yield Stage(gateway, gateway.port(), devices)
        assert gateway.stop() == 0
        assert gateway.complaints() == []


@pytest.mark.parametrize("version", [TLS12, TLS13])
@pytest.mark.parametrize(
    "tries", [TRIES, pytest.param(PROVE_TRIES, marks=[pytest.mark.prove, pytest.mark.timeout(900)])]
)
def test_the_same_bytes_after_the_same_time(
    stage: Stage, version: TlsVersion, tries: int, measured: Callable[[str], None]
) -> None:
    names = sorted(stage.devices)
    if version is TLS12:
        names.remove("wrong_hash")  # a key goes with suites of either hash there
    times: dict[str, list[float]] = {name: [] for name in names}
    order = names * tries
    random.Random(version).shuffle(order)
    for name in order:
        answer, seconds = _refusal(stage.port, stage.devices[name], version)
        assert answer == ALERTS[version], name
        times[name].append(seconds)
    outcomes = stage.gateway.metric_by("outcome", "pskgw_handshakes_total")
    assert set(names) - {"wrong_hash"} <= set(outcomes), "what was refused was refused for these reasons"
    unknown = times["unknown_identity"]
    deltas = {name: cliffs_delta(unknown, times[name]) for name in names if name != "unknown_identity"}
    medians = {name: round(statistics.median(each) * 1e6) for name, each in times.items()}
    measured(
        f"{version.label}, {tries} tries each: "
        + ", ".join(f"{name} {delta:+.3f}" for name, delta in deltas.items())
        + f"; medians in us {medians}"
    )
    noise = 3 / (1.5 * tries) ** 0.5  # the deviation of delta between two equal samples is sqrt(2 / (3 n))
    bound = DELTA_MAX if tries >= PROVE_TRIES else DELTA_MAX + noise
    assert max(map(abs, deltas.values())) < bound


def _refusal(port: int, device: Device, version: TlsVersion) -> tuple[bytes, float]:
    """What answers the flight that brings the identity and its proof, and how many seconds later."""
    with TlsDevice(port, device, version=version) as peer:
        if version is TLS12:
            peer.transmit()
            peer.take()
        flight = peer.flight()
        began = time.perf_counter()
        peer.sock.sendall(flight)
        answer = peer.sock.recv(4096)
        return answer, time.perf_counter() - began
