"""What a new device is told besides its key: commands to try it with, a QR code, and what small clients refuse."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import segno

from gateway.registry.store import AddedDevice
from gateway.server.settings import Address, ListenerSettings

__all__ = ["draw_qr", "shared_key", "try_commands", "warnings"]

SMALL_CLIENT_IDENTITY_BYTES = 32  # tinydtls: DTLS_PSK_MAX_CLIENT_IDENTITY_LEN
SMALL_CLIENT_KEY_BYTES = 32  # mbedTLS: MBEDTLS_PSK_MAX_LEN as built by default

ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- a table of what to connect to, binds nothing


def try_commands(
    listeners: Sequence[ListenerSettings], device: AddedDevice, key_file: Path | None
) -> list[str]:
    """Commands that connect as this device to the gateway on this machine; none when no listener serves its realm."""
    for listener in listeners:
        if listener.realm == device.realm:
            return [_openssl(listener, device, key_file), _connect(listener, device, key_file)]
        for server_name, realm in listener.realms_by_sni.items():
            if realm == device.realm:  # `gatewayctl connect` sends no server name
                return [f"{_openssl(listener, device, key_file)} -servername {server_name}"]
    return []


def _openssl(listener: ListenerSettings, device: AddedDevice, key_file: Path | None) -> str:
    key = f"$(cat {shlex.quote(str(key_file))})" if key_file else device.key.hex()
    identity = shlex.quote(device.identity)
    return f"openssl s_client -quiet -connect {_address(listener)} -psk_identity {identity} -psk {key}"


def _connect(listener: ListenerSettings, device: AddedDevice, key_file: Path | None) -> str:
    command = f"gatewayctl connect {_address(listener)} --identity {shlex.quote(device.identity)}"
    if key_file:
        return f"{command} --key-file {shlex.quote(str(key_file))}"
    return f"PSKGW_KEY={device.key.hex()} {command}"


def _address(listener: ListenerSettings) -> Address:
    host, port = listener.bind.host, listener.bind.port
    return Address(ANY_HOSTS.get(host, host), port)


def draw_qr(device: AddedDevice) -> None:
    """Identity, key and hint as a JSON object in a QR code, drawn with half blocks."""
    content = {"identity": device.identity, "key": device.key.hex()} | (
        {"hint": device.hint} if device.hint else {}
    )
    print()
    segno.make_qr(json.dumps(content, separators=(",", ":"), ensure_ascii=False)).terminal(compact=True)


def warnings(listeners: Sequence[ListenerSettings], device: AddedDevice) -> Iterator[str]:
    """What will keep the device from connecting, or some clients from being this device.

    A client that cuts an identity or a key short fails as with a wrong key, and nothing tells why.
    """
    if not try_commands(listeners, device, None):
        yield (
            f"no listener serves the realm {device.realm}: set `realm` or `realms_by_sni` of one in the configuration"
        )
    identity_bytes = len(device.identity.encode())
    if identity_bytes > SMALL_CLIENT_IDENTITY_BYTES:
        yield (
            f"the identity has {identity_bytes} bytes: tinydtls (Zephyr, Contiki) takes at most "
            f"{SMALL_CLIENT_IDENTITY_BYTES}"
        )
    if len(device.key) > SMALL_CLIENT_KEY_BYTES:
        yield (
            f"the key has {len(device.key)} bytes: mbedTLS (ESP32, Zephyr) takes at most {SMALL_CLIENT_KEY_BYTES} "
            "unless it is built with a larger MBEDTLS_PSK_MAX_LEN"
        )


def shared_key(others: Sequence[str]) -> Iterator[str]:
    """A key belongs to one client and one server (RFC 9257, 4.1 and 7): whoever has it can be all of them."""
    if others:
        yield f"the same key is that of {', '.join(others)}: give every device and every identity a key of its own"
