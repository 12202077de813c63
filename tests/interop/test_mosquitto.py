"""`mosquitto_pub` and `mosquitto_sub` through a stream route to a real Mosquitto, which speaks no TLS."""

import uuid

import pytest

from tests.interop.conftest import Fleet
from tests.support.gateway import Device
from tests.support.peers import Mosquitto, Peer, Version, mosquitto_pub, mosquitto_sub, plain_mosquitto_sub


def topic() -> str:
    return f"devices/{uuid.uuid4()}"


def subscribed(peer: Peer) -> None:
    peer.expect(r"^Subscribed \(mid: \d+\)")


@pytest.mark.parametrize(
    ("version", "options", "suite"),
    [
        ("TLSv1.3", (), "TLS_AES_128_GCM_SHA256"),
        ("TLSv1.2", (), "ECDHE-PSK-CHACHA20-POLY1305"),
        ("TLSv1.2", ("--ciphers", "PSK-AES128-GCM-SHA256"), "PSK-AES128-GCM-SHA256"),
    ],
)
def test_from_one_device_to_another(
    either_loop: Fleet, version: Version, options: tuple[str, ...], suite: str
) -> None:
    """Published in one session, and received in the other: both ends are devices of the gateway."""
    subscriber, publisher, where = either_loop["mqtt"], either_loop["mqtt too"], topic()
    port = either_loop.port
    with mosquitto_sub(port, subscriber, "-t", where, "-q", 1, *options, highest=version) as sub:
        subscribed(sub)
        (session,) = either_loop.gateway.sessions()
        assert (session["device"], session["route"]) == ("mqtt", "mqtt")
        assert (session["tls_version"], session["cipher"]) == (version, suite)
        for number in range(3):
            message = f"reading {number} of {where}"
            sending = ("-t", where, "-q", 1, "-m", message)
            with mosquitto_pub(port, publisher, *sending, *options, highest=version) as pub:
                assert pub.ended() == 0, pub.output
            sub.expect(rf"^{message}\n")


def test_a_large_message(either_loop: Fleet) -> None:
    """A payload of many TLS records, both ways."""
    where, message = topic(), "0123456789abcdef" * 32_768
    with mosquitto_sub(either_loop.port, either_loop["mqtt"], "-t", where, "-C", 1) as sub:
        subscribed(sub)
        with mosquitto_pub(either_loop.port, either_loop["mqtt too"], "-t", where, "-s") as pub:
            pub.send(message)
            assert pub.finish() == 0, pub.output
        assert sub.ended() == 0
        assert message in sub.output


def test_straight_to_the_broker(either_loop: Fleet, broker: Mosquitto) -> None:
    """What a device publishes is there for a client that the gateway has nothing to do with."""
    where = topic()
    with plain_mosquitto_sub(broker, "-t", where, "-C", 1) as sub:
        subscribed(sub)
        with mosquitto_pub(either_loop.port, either_loop["mqtt"], "-t", where, "-m", "hello") as pub:
            assert pub.ended() == 0
        assert sub.ended() == 0
        assert "\nhello\n" in sub.output


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_wrong_key(either_loop: Fleet, version: Version) -> None:
    device = Device("mqtt", "00" * 32)
    with mosquitto_pub(either_loop.port, device, "-t", topic(), "-m", "hello", highest=version) as pub:
        assert pub.ended() != 0
        assert ("bad record mac" if version == "TLSv1.2" else "decrypt error") in pub.output
    either_loop.gateway.wait_for_event("handshake_failed", identity="mqtt", outcome="wrong_key")


def test_a_disabled_device_is_cut_off(either_loop: Fleet) -> None:
    """Its MQTT session ends; its client connects again at once, does not get in, and gives up."""
    device, where = either_loop.take("mqtt"), topic()
    with mosquitto_sub(either_loop.port, device, "-t", where) as sub:
        subscribed(sub)
        either_loop.gateway.ctl("disable-device", device.identity)
        assert sub.ended() != 0
    either_loop.gateway.wait_for_event("session_stopped", device=device.identity, reason="disabled")
    either_loop.gateway.wait_for_event("handshake_failed", identity=device.identity, outcome="disabled")
    assert either_loop.gateway.sessions() == []
    with either_loop.change() as registry:
        registry.set_device_enabled("default", device.identity, enabled=True)
    with mosquitto_sub(either_loop.port, device, "-t", where) as sub:
        subscribed(sub)
