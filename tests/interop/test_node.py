"""Node's `tls` with `pskCallback`."""

import uuid
from typing import Any

import pytest

from tests.interop.conftest import HINT, Fleet
from tests.support.gateway import Device
from tests.support.peers import node

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "defaults": ({}, "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
    "ciphers PSK": ({"ciphers": "PSK"}, "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
    "1.3": ({"minVersion": "TLSv1.3"}, "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
    "1.2": ({"maxVersion": "TLSv1.2", "ciphers": "PSK"}, "TLSv1.2", "ECDHE-PSK-CHACHA20-POLY1305"),
    "1.2 plain PSK": ({"maxVersion": "TLSv1.2", "ciphers": "kPSK"}, "TLSv1.2", "PSK-AES128-GCM-SHA256"),
}


@pytest.mark.parametrize("case", CASES)
def test_lines(either_loop: Fleet, case: str) -> None:
    options, version, suite = CASES[case]
    payloads = [f"{case} {uuid.uuid4()}" for _ in range(3)]
    with node(either_loop.port, either_loop["meter"], **options) as peer:
        peer.expect(rf"^secure {version} {suite} alpn none reused (true|false)\n")
        for number, payload in enumerate(payloads, 1):
            peer.send(payload + "\n")
            peer.expect(rf"^data ok {number}\n")
        assert peer.finish() == 0
        peer.expect("^end\n(.*\n)*close clean\n")
    sent = [event for event in either_loop.gateway.output_events() if event["data"].startswith(case)]
    assert [event["data"] for event in sent][-3:] == payloads
    assert [int(event["sequence"]) for event in sent][-3:] == [1, 2, 3]


def test_hint_server_name_and_alpn(fleet: Fleet) -> None:
    options = {"maxVersion": "TLSv1.2", "ciphers": "PSK", "servername": "hall.example"}
    with node(fleet.port, fleet["hall/meter"], **options, ALPNProtocols=["h2", "readings/2"]) as peer:
        peer.expect(rf"^hint {HINT}\n")
        peer.expect(r"^secure TLSv1\.2 \S+ alpn readings/2 reused false\n")
        event = fleet.arrives(peer, "data ", file="second.jsonl")
        assert peer.finish() == 0
    assert event["realm"] == "hall"


@pytest.mark.parametrize("case", ["1.2", "1.3"])
def test_wrong_key(fleet: Fleet, case: str) -> None:
    code = {"1.2": "ERR_SSL_SSLV3_ALERT_BAD_RECORD_MAC", "1.3": "ERR_SSL_TLSV1_ALERT_DECRYPT_ERROR"}[case]
    with node(fleet.port, Device("meter", "00" * 32), **CASES[case][0]) as peer:
        peer.expect(rf"^error {code}\n")
        peer.ended()
        assert "secure" not in peer.output
