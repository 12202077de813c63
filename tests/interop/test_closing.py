"""The end of a session, on the wire: close_notify from both sides, then FIN from both."""

import pytest

from tests.interop.conftest import Fleet
from tests.support.peers import CLOSE_NOTIFY, WireTap, s_client

VERSIONS = {
    "TLSv1.2": ("-tls1_2", "-cipher", "PSK-AES128-GCM-SHA256"),
    "TLSv1.3": ("-tls1_3",),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_device_ends(either_loop: Fleet, version: str) -> None:
    device = either_loop["meter"]
    with WireTap(either_loop.port) as wire, s_client(wire.port, device, *VERSIONS[version], "-msg") as peer:
        either_loop.arrives(peer)
        assert peer.finish() == 0
        assert "warning close_notify" in peer.output
    *_, theirs, ours = wire.records()
    assert (theirs.side, theirs.kind, theirs.size) == ("device", *CLOSE_NOTIFY[version])
    assert (ours.side, ours.kind, ours.size) == ("gateway", *CLOSE_NOTIFY[version])
    assert wire.gateway_end == "fin"


@pytest.mark.parametrize("version", VERSIONS)
def test_gateway_ends(either_loop: Fleet, version: str) -> None:
    device = either_loop.take("lines")
    with WireTap(either_loop.port) as wire, s_client(wire.port, device, *VERSIONS[version], "-msg") as peer:
        either_loop.arrives(peer)
        either_loop.gateway.ctl("kick-device", device.identity)
        peer.expect(rf"^<<< {version.replace('v', ' ')}, Alert \[length 0002\], warning close_notify\n")
        assert peer.ended() == 0
    last = wire.records("gateway")[-1]
    assert (last.kind, last.size) == CLOSE_NOTIFY[version]
    assert wire.gateway_end == "fin"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_line_without_its_end(either_loop: Fleet, version: str) -> None:
    """close_notify ends the last line, too; its answer comes before the gateway's close_notify."""
    device = either_loop["meter"]
    with WireTap(either_loop.port) as wire, s_client(wire.port, device, *VERSIONS[version]) as peer:
        peer.expect(r"Verify return code: 0 \(ok\)")
        peer.send(f"unfinished {version}")
        assert peer.finish() == 0
    answer, close = wire.records("gateway")[-2:]
    assert answer.size == len("ok 1\n") + CLOSE_NOTIFY[version][1] - 2
    assert (close.kind, close.size) == CLOSE_NOTIFY[version]
    payloads = [event["data"] for event in either_loop.gateway.output_events()]
    assert payloads.count(f"unfinished {version}") == 1
