"""Several identities of devices in one ClientHello: the first that may connect is taken, whatever stands before it."""

import socket

import pytest

from tests.interop.conftest import Fleet
from tests.support.gateway import Device
from tests.support.raw_hello import client_hello, selected_identity

DECRYPT_ERROR = bytes.fromhex("15 0303 0002 02 33")
SERVER_HELLO = 2

UNKNOWN = Device("nobody", "11" * 32)
TICKET = Device("\x01\x02 a ticket has bytes that no identity has", "22" * 32)


def answer(fleet: Fleet, devices: list[Device]) -> bytes:
    """The first record that comes back."""
    with socket.create_connection(("127.0.0.1", fleet.port), 10) as sock, sock.makefile("rb") as stream:
        sock.sendall(client_hello(devices))
        header = stream.read(5)
        return header + stream.read(int.from_bytes(header[3:5]))


@pytest.mark.parametrize(
    ("offered", "selected"),
    [
        (["meter"], 0),
        (["meter", "here"], 0),
        (["unknown", "meter"], 1),
        (["ticket", "unknown", "disabled", "expired", "elsewhere", "here", "meter"], 5),
        (["ticket", "meter"], 1),
    ],
)
def test_first_that_may_connect(fleet: Fleet, offered: list[str], selected: int) -> None:
    devices = fleet.devices | {"unknown": UNKNOWN, "ticket": TICKET}
    record = answer(fleet, [devices[name] for name in offered])
    assert (record[0], record[5]) == (22, SERVER_HELLO)
    assert selected_identity(record) == selected


@pytest.mark.parametrize(
    "offered",
    [
        ["unknown"],
        ["ticket", "unknown"],
        ["unknown", "disabled"],
        ["ticket", "early", "elsewhere", "unknown"],
    ],
)
def test_none_that_may(fleet: Fleet, offered: list[str]) -> None:
    devices = fleet.devices | {"unknown": UNKNOWN, "ticket": TICKET}
    assert answer(fleet, [devices[name] for name in offered]) == DECRYPT_ERROR
