"""The other end: a device's client, tunnel and fleet on the same TLS-PSK engine.

The public API, documented in docs/client.md:

    from gateway.device import Client, FileStore, Key, KeyRing

    async with Client("gateway.example", 8883, KeyRing.of("meter-7", key)) as client:
        await client.send(b"21.5")
"""

from gateway.device.client import Client, ClientSettings, DeviceClient
from gateway.device.incoming import Command, Receipt, Reply
from gateway.device.keyring import DeviceKey, KeyRing, read_key_file
from gateway.device.store import FileStore, MemoryStore, StoreFull
from gateway.errors import DeviceError, DeviceRefused, MessageRefused
from gateway.registry.sealing import Key
from gateway.tls.openssl import TlsVersion

__all__ = [
    "Client",
    "ClientSettings",
    "Command",
    "DeviceClient",
    "DeviceError",
    "DeviceKey",
    "DeviceRefused",
    "FileStore",
    "Key",
    "KeyRing",
    "MemoryStore",
    "MessageRefused",
    "Receipt",
    "Reply",
    "StoreFull",
    "TlsVersion",
    "read_key_file",
]
