"""A client that breaks the rules of TLS 1.3: the right alert, the same one for a device that is not known, no harm beside.

What a rule asks for stands in RFC 8446; where it names no alert, it is the one of OpenSSL.
"""

import secrets
from collections.abc import Callable

import pytest
from tlslite.messages import ClientHello, PskIdentity

from tests.faults.conftest import Stage
from tests.support.bad_hellos import record
from tests.support.gateway import Device
from tests.support.misbehaving import Edit, Misbehaving, drop, insert, of_second_hello

UNEXPECTED_MESSAGE, BAD_RECORD_MAC, HANDSHAKE_FAILURE, ILLEGAL_PARAMETER = 10, 20, 40, 47
DECODE_ERROR, DECRYPT_ERROR, PROTOCOL_VERSION, MISSING_EXTENSION = 50, 51, 70, 109
SERVER_NAME, MAX_FRAGMENT_LENGTH, SUPPORTED_GROUPS, PRE_SHARED_KEY, EARLY_DATA = 0, 1, 10, 41, 42
SUPPORTED_VERSIONS, COOKIE, PSK_MODES, KEY_SHARE = 43, 44, 45, 51
CHANGE_CIPHER_SPEC, HANDSHAKE, DATA = 20, 22, 23
WRONG_KEY = "42" * 32


def psk_first(hello: ClientHello) -> None:
    hello.extensions.insert(0, hello.extensions.pop())


def groups_twice(hello: ClientHello) -> None:
    hello.extensions.insert(0, next(each for each in hello.extensions if each.extType == SUPPORTED_GROUPS))


def binders(*sizes: int) -> Edit:
    def edit(hello: ClientHello) -> None:
        hello.extensions[-1].binders = [bytearray(size) for size in sizes]

    return edit


def next_version(hello: ClientHello) -> None:
    next(each for each in hello.extensions if each.extType == SUPPORTED_VERSIONS).versions = [(3, 5)]


def attribute(name: str, value: object) -> Edit:
    return lambda hello: setattr(hello, name, value)


def other_identity(hello: ClientHello) -> None:
    hello.extensions[-1].identities = [PskIdentity().create(bytearray(b"beside"), 0)]


@pytest.mark.parametrize(
    ("edit", "alert"),
    [
        pytest.param(psk_first, ILLEGAL_PARAMETER, id="pre_shared_key is not last (4.2.11)"),
        pytest.param(groups_twice, DECODE_ERROR, id="an extension twice"),
        pytest.param(drop(PSK_MODES), HANDSHAKE_FAILURE, id="no modes beside a PSK (4.2.9)"),
        pytest.param(drop(KEY_SHARE), MISSING_EXTENSION, id="no key share (9.2)"),
        pytest.param(drop(SUPPORTED_GROUPS), MISSING_EXTENSION, id="no groups (9.2)"),
        pytest.param(next_version, PROTOCOL_VERSION, id="a version that does not exist"),
        pytest.param(attribute("compression_methods", [1]), ILLEGAL_PARAMETER, id="compression (4.1.2)"),
        pytest.param(
            attribute("compression_methods", [0, 1]), ILLEGAL_PARAMETER, id="compression beside none"
        ),
        pytest.param(attribute("session_id", bytearray(33)), DECODE_ERROR, id="a session id of 33 bytes"),
        pytest.param(insert(MAX_FRAGMENT_LENGTH, b"\x09"), ILLEGAL_PARAMETER, id="a fragment length of none"),
        pytest.param(insert(SERVER_NAME, b"\0\1x"), DECODE_ERROR, id="a server name that ends too soon"),
    ],
)
def test_a_hello_that_breaks_a_rule(stage: Stage, edit: Edit, alert: int) -> None:
    with stage.counts("protocol_error"), Misbehaving(stage.port, stage.device, edit=edit) as client:
        assert client.handshake() == alert
    refusals = []
    for stranger in (Device("nobody", WRONG_KEY), Device(stage.device.identity, WRONG_KEY)):
        with Misbehaving(stage.port, stranger, edit=edit) as client:
            refusals.append(client.handshake())
    assert refusals[0] == refusals[1], "a broken rule tells who is known"


@pytest.mark.parametrize(
    ("edit", "alert", "outcome"),
    [
        pytest.param(binders(), DECODE_ERROR, "protocol_error", id="none"),
        pytest.param(binders(32, 32), DECODE_ERROR, "protocol_error", id="one too many"),
        pytest.param(binders(31), DECODE_ERROR, "protocol_error", id="of 31 bytes"),
        pytest.param(binders(32), DECRYPT_ERROR, "wrong_key", id="wrong"),
        pytest.param(binders(48), DECRYPT_ERROR, "unknown_identity", id="of the other hash"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_binders_that_prove_nothing(stage: Stage, edit: Edit, alert: int, outcome: str, known: bool) -> None:
    device = stage.device if known else Device("nobody", stage.device.key)
    counted = outcome if known or outcome == "protocol_error" else "unknown_identity"
    with (
        stage.counts(counted),
        Misbehaving(stage.port, device, edit=edit, keep_binders=True) as client,
    ):
        assert client.handshake() == alert


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(insert(MAX_FRAGMENT_LENGTH, b"\x01"), id="a maximum fragment length of 512"),
        pytest.param(insert(COOKIE, b"\0\1x"), id="a cookie that nobody gave"),
        pytest.param(insert(0xFE0D, bytes(300)), id="an extension that is not known"),
        pytest.param(insert(EARLY_DATA), id="early data announced and none sent"),
    ],
)
def test_what_is_allowed_or_to_be_ignored(stage: Stage, edit: Edit) -> None:
    with stage.counts("ok"), Misbehaving(stage.port, stage.device, edit=edit) as client:
        assert client.handshake() is None
        assert client.line() == b"ok 1\n"


def test_a_second_hello_as_the_first(stage: Stage) -> None:
    with stage.counts("ok"), Misbehaving(stage.port, stage.device, keyShares=[]) as client:
        assert client.handshake() is None
        assert client.line() == b"ok 1\n"


@pytest.mark.parametrize(
    ("edit", "alert", "outcome"),
    [
        pytest.param(other_identity, HANDSHAKE_FAILURE, "no_shared_cipher", id="another identity"),
        pytest.param(drop(PRE_SHARED_KEY), HANDSHAKE_FAILURE, "no_shared_cipher", id="no identity"),
        pytest.param(next_version, PROTOCOL_VERSION, "protocol_error", id="another version"),
        pytest.param(
            attribute("cipher_suites", [0x1303]), ILLEGAL_PARAMETER, "protocol_error", id="other suites"
        ),
    ],
)
def test_a_second_hello_that_changes_its_mind(stage: Stage, edit: Edit, alert: int, outcome: str) -> None:
    """After a HelloRetryRequest: `beside` is a device too, and its name in the second hello opens nothing."""
    with (
        stage.counts(outcome),
        Misbehaving(
            stage.port,
            stage.device,
            edit=of_second_hello(edit),
            keep_binders=edit is other_identity,
            keyShares=[],
        ) as client,
    ):
        assert client.handshake() == alert


def noise(records: int) -> bytes:
    """Early data as it looks to a server that cannot read it."""
    return b"".join(record(secrets.token_bytes(64), 0x0303, DATA) for _ in range(records))


def test_early_data_is_passed_over(stage: Stage) -> None:
    """RFC 8446 section 4.2.10: a server that takes none skips what it cannot decrypt, and the handshake goes on."""
    with stage.counts("ok"), Misbehaving(stage.port, stage.device, edit=insert(EARLY_DATA)) as client:
        client.after_hello = noise(3)
        assert client.handshake() is None
        assert client.line() == b"ok 1\n"  # the first line: nothing of the early data counted as one


def test_early_data_without_end_is_not(stage: Stage) -> None:
    with (
        stage.counts("protocol_error"),
        Misbehaving(stage.port, stage.device, edit=insert(EARLY_DATA)) as client,
    ):
        client.after_hello = noise(400)
        assert (client.handshake() or client.alert()) == UNEXPECTED_MESSAGE


def test_data_behind_a_hello_that_announced_none(stage: Stage) -> None:
    with stage.counts("wrong_key"), Misbehaving(stage.port, stage.device) as client:
        client.after_hello = noise(1)
        assert (client.handshake() or client.alert()) == BAD_RECORD_MAC


def message(kind: int, body: bytes) -> Callable[[Misbehaving], None]:
    return lambda client: client.send_message(HANDSHAKE, bytes([kind]) + len(body).to_bytes(3) + body)


def plain(kind: int, body: bytes) -> Callable[[Misbehaving], None]:
    return lambda client: client.sock.sendall(record(body, 0x0303, kind))


def empty_records(client: Misbehaving) -> None:
    for _ in range(100):
        client.send_message(DATA, b"")


@pytest.mark.parametrize(
    ("act", "alert"),
    [
        pytest.param(
            message(1, bytes(60)), UNEXPECTED_MESSAGE, id="a hello: there is no renegotiation (4.1.2)"
        ),
        pytest.param(message(4, bytes(20)), UNEXPECTED_MESSAGE, id="a ticket from a client"),
        pytest.param(message(20, bytes(32)), UNEXPECTED_MESSAGE, id="another Finished"),
        pytest.param(message(13, bytes(3)), UNEXPECTED_MESSAGE, id="a request for a certificate"),
        pytest.param(message(24, b"\2"), ILLEGAL_PARAMETER, id="a key update of no kind (4.6.3)"),
        pytest.param(
            lambda client: client.send_message(99, b"x"), UNEXPECTED_MESSAGE, id="a record of no type"
        ),
        pytest.param(empty_records, UNEXPECTED_MESSAGE, id="empty records"),
        pytest.param(plain(CHANGE_CIPHER_SPEC, b"\1"), UNEXPECTED_MESSAGE, id="change_cipher_spec (5)"),
        pytest.param(plain(21, b"\1\0"), UNEXPECTED_MESSAGE, id="a plain alert"),
        pytest.param(plain(DATA, bytes(40)), BAD_RECORD_MAC, id="data that is not encrypted"),
        pytest.param(plain(DATA, bytes(16641)), 22, id="a record over the bound (5.2)"),
    ],
)
def test_a_session_that_breaks_a_rule(stage: Stage, act: Callable[[Misbehaving], None], alert: int) -> None:
    with stage.counts("ok"), Misbehaving(stage.port, stage.device) as client:
        assert client.handshake() is None
        assert client.line() == b"ok 1\n"
        act(client)
        assert client.alert() == alert
    assert stage.gateway.events("session_failed")[-1]["device"] == "d"


def test_key_updates_are_followed(stage: Stage) -> None:
    with stage.counts("ok"), Misbehaving(stage.port, stage.device) as client:
        assert client.handshake() is None
        for number in range(1, 4):
            for requested in (0, 1):
                for _ in client.send_keyupdate_request(requested):
                    pass
            assert client.line() == b"ok %d\n" % number
