"""What a new device is told besides its key: where it connects, commands to try it with, a QR code, what clients refuse."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import segno
import typer

from gateway.cli.bundle import Access, check_folder, write_bundle
from gateway.cli.recipes import recipe, recipe_names
from gateway.errors import ConfigurationError
from gateway.registry.records import PskHash
from gateway.registry.store import AddedDevice
from gateway.server.settings import Address, ListenerSettings
from gateway.tls.profiles import DHE_PSK_SUITES, PROFILES, TLS13_SUITES, ProfileName

__all__ = ["Provisioning", "shared_key", "try_commands", "warnings"]

SMALL_CLIENT_IDENTITY_BYTES = 32  # tinydtls: DTLS_PSK_MAX_CLIENT_IDENTITY_LEN
SMALL_CLIENT_KEY_BYTES = 32  # mbedTLS: MBEDTLS_PSK_MAX_LEN as built by default

ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- a table of what to connect to, binds nothing


def _serving(listeners: Sequence[ListenerSettings], realm: str) -> tuple[ListenerSettings, str | None] | None:
    """The first listener that serves a realm, and the server name that a device has to send for it, if any."""
    for listener in listeners:
        if listener.realm == realm:
            return listener, None
        for server_name, name in listener.realms_by_sni.items():
            if name == realm:
                return listener, server_name
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Provisioning:
    """What was asked for beside a device's key: `client` names a recipe, `folder` takes a bundle.

    Whatever can be wrong is said by `check`, before there is a key that could be lost.
    """

    listeners: Sequence[ListenerSettings]
    node_name: str
    host: str | None
    client: str | None
    folder: Path | None

    def check(self, realm: str) -> None:
        """See that all of it can be done. Raises ConfigurationError or BadParameter."""
        if self.client is None and self.folder is None:
            return
        if self.client is not None and self.client not in recipe_names():
            raise typer.BadParameter(f"there is one for {', '.join(recipe_names())}", param_hint="--for")
        if _serving(self.listeners, realm) is None:
            raise ConfigurationError(
                f"no listener serves the realm {realm}: set `realm` or `realms_by_sni` of one in the configuration"
            )
        if self.folder is not None:
            check_folder(self.folder)

    def recipe(self, device: AddedDevice, hash_name: PskHash) -> str | None:
        """The recipe for this device, when one was asked for."""
        return None if self.client is None else recipe(self.client, self._access(device, hash_name))

    def write(self, device: AddedDevice, hash_name: PskHash) -> list[Path]:
        """Write the bundle, when one was asked for; the files that were written. Raises ConfigurationError."""
        return [] if self.folder is None else write_bundle(self.folder, self._access(device, hash_name))

    def draw_qr(self, device: AddedDevice, hash_name: PskHash) -> None:
        """Identity, key, hint and, when a listener serves the realm, host and port: JSON in a QR code of half blocks."""
        content: dict[str, str | int] = {"identity": device.identity, "key": device.key.hex()}
        if device.hint:
            content["hint"] = device.hint
        if _serving(self.listeners, device.realm) is not None:
            access = self._access(device, hash_name)
            content |= {"host": access.host, "port": access.port}
        print()
        segno.make_qr(json.dumps(content, separators=(",", ":"), ensure_ascii=False)).terminal(compact=True)

    def _access(self, device: AddedDevice, hash_name: PskHash) -> Access:
        """Where the device connects.

        The host is the one that was given, else the server name that stands for its realm, else the listener's own; for
        a listener on every address, the name of this node.
        """
        serving = _serving(self.listeners, device.realm)
        assert serving is not None, "checked before"
        listener, server_name = serving
        bound = listener.bind.host
        tls12 = PROFILES[ProfileName(listener.profile)].tls12_suites
        return Access(
            realm=device.realm,
            device=device.device,
            identity=device.identity,
            key=device.key,
            host=self.host or server_name or (self.node_name if bound in ANY_HOSTS else bound),
            port=listener.bind.port,
            server_name=server_name,
            hint=device.hint,
            hash=hash_name,
            suites=(*TLS13_SUITES[hash_name], *tls12, *(DHE_PSK_SUITES if listener.allow_dhe_psk else ())),
        )


def try_commands(
    listeners: Sequence[ListenerSettings], device: AddedDevice, key_file: Path | None
) -> list[str]:
    """Commands that connect as this device to the gateway on this machine; none when no listener serves its realm."""
    serving = _serving(listeners, device.realm)
    if serving is None:
        return []
    listener, server_name = serving
    if server_name is not None:  # `gatewayctl connect` sends no server name
        return [f"{_openssl(listener, device, key_file)} -servername {server_name}"]
    return [_openssl(listener, device, key_file), _connect(listener, device, key_file)]


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
