"""The client library on every framing of messages, with ids of its own, and commands on the way back."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.device import Client, ClientSettings, Command, Key, KeyRing
from gateway.net.loop import run
from gateway.registry.store import NewDevice
from gateway.wire.framings import FRAMINGS
from tests.support.gateway import Gateway, new_gateway, running

PAYLOAD = bytes(range(256))
"""Every byte there is, line breaks too, where the framing allows it."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    routes = "".join(
        f'[[routes]]\nname = "{name}"\nmatch = {{ group = "{name}" }}\nframing = "{name}"\n'
        f'message_id = "prefix"\nbackend = "events"\n'
        for name in FRAMINGS
    )
    gateway = new_gateway(tmp_path_factory.mktemp("framings") / "gateway", routes=routes)
    with running(gateway):
        yield gateway


@pytest.mark.parametrize("framing", list(FRAMINGS))
def test_messages_go_and_commands_come(gateway: Gateway, framing: str, tmp_path: Path) -> None:
    (device,) = gateway.add_devices(NewDevice(identity=f"d-{framing}", group=framing))
    gateway.wait_until_followed()
    payload = PAYLOAD if framing != "lines" else PAYLOAD.replace(b"\n", b"").replace(b"\r", b"")
    (tmp_path / "command").write_bytes(b"do " + payload)

    async def scenario() -> None:
        ring = KeyRing.of(device.identity, Key(bytes.fromhex(device.key)))
        settings = ClientSettings(framing=framing, message_ids=True)
        async with Client("127.0.0.1", gateway.port(), ring, settings=settings) as client:
            receipts = await asyncio.gather(*(client.send(payload) for _ in range(50)))
            assert len({receipt.message_id for receipt in receipts}) == 50
            await asyncio.to_thread(
                gateway.ctl, "send-command", device.identity, "--file", tmp_path / "command"
            )
            command = await asyncio.wait_for(anext(aiter(client.incoming())), 10)
            assert isinstance(command, Command)
            assert command.payload == b"do " + payload
            arrived = {event["id"] for event in gateway.output_events() if event["device"] == device.identity}
            assert arrived == {receipt.message_id for receipt in receipts}

    run(scenario())
