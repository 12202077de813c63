"""Sessions as playbooks: a server session against a client session, both over memory, each with a real OpenSSL inside."""

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gateway.errors import PeerError, PeerFault
from gateway.tls.contexts import ContextStore, RealmContexts
from gateway.tls.openssl import ClientContext, TlsFailure, TlsVersion
from gateway.tls.profiles import PROFILES, ProfileName
from gateway.tls.session import (
    ClientSession,
    Established,
    Event,
    Failed,
    PeerClosed,
    PskChoice,
    ServerSession,
)
from gateway.wire.client_hello import ClientHello, OfferedPsk
from tests.support.memory import resident_bytes

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
STORE = ContextStore()


@dataclasses.dataclass
class Policy:
    """A registry of one device, and what it was asked."""

    known: dict[bytes, tuple[bytes, str]] = dataclasses.field(
        default_factory=lambda: {b"dev": (KEY, "sha256")}
    )
    hint: str | None = "realm-hint"
    profile: ProfileName = ProfileName.COMPATIBLE
    alpn: tuple[bytes, ...] = ()
    refuses: Exception | None = None
    asked: list[tuple[bytes, ...]] = dataclasses.field(default_factory=list)

    def contexts_for(self, _hello: ClientHello) -> RealmContexts:
        if self.refuses is not None:
            raise self.refuses
        return STORE.contexts(self.profile, self.hint, self.alpn)

    def choose_psk(self, offered: Sequence[OfferedPsk]) -> PskChoice | None:
        self.asked.append(tuple(psk.identity for psk in offered))
        for psk in offered:
            if psk.identity in self.known:
                return PskChoice(psk.identity, *self.known[psk.identity])
        decoy_hash = "sha384" if offered[0].binder_length == 48 else "sha256"
        return PskChoice(offered[0].identity, OTHER_KEY[::-1] + b"decoy", decoy_hash)


Keys = Callable[[bytes | None], tuple[bytes, bytes, str] | None]


def keys_of(identity: bytes = b"dev", key: bytes = KEY, hash_name: str = "sha256") -> Keys:
    return lambda _hint: (identity, key, hash_name)


TLS12 = ClientContext(("PSK-AES128-GCM-SHA256",), (), highest=TlsVersion.TLS1_2)
ECDHE = ClientContext(("ECDHE-PSK-CHACHA20-POLY1305",), (), highest=TlsVersion.TLS1_2)
TLS13 = ClientContext((), ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"), lowest=TlsVersion.TLS1_3)
BOTH = ClientContext(PROFILES[ProfileName.COMPATIBLE].tls12_suites, ("TLS_AES_128_GCM_SHA256",))


def converse(
    client: ClientSession, server: ServerSession, piece: int = 1 << 20
) -> tuple[list[Event], list[Event]]:
    """Carry bytes both ways, in pieces, until both are silent; what happened at the client and at the server."""
    at_client: list[Event] = []
    at_server: list[Event] = []
    while True:
        up, down = client.output(), b""
        for start in range(0, len(up), piece):
            at_server += server.receive(up[start : start + piece])
        down = server.output()
        for start in range(0, len(down), piece):
            at_client += client.receive(down[start : start + piece])
        if not up and not down:
            return at_client, at_server


def connect(context: ClientContext, keys: Keys, policy: Policy) -> tuple[ClientSession, ServerSession]:
    client, server = ClientSession(context, keys), ServerSession(policy)
    converse(client, server)
    return client, server


def failure(events: Sequence[Event]) -> PeerError | TlsFailure:
    (failed,) = [event for event in events if isinstance(event, Failed)]
    return failed.error


@pytest.mark.parametrize(
    ("context", "version", "cipher"),
    [
        (TLS12, "TLSv1.2", "PSK-AES128-GCM-SHA256"),
        (ECDHE, "TLSv1.2", "ECDHE-PSK-CHACHA20-POLY1305"),
        (TLS13, "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
        (BOTH, "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_known_device_gets_in(context: ClientContext, version: str, cipher: str, piece: int) -> None:
    client, server = ClientSession(context, keys_of()), ServerSession(Policy())
    at_client, at_server = converse(client, server, piece)
    assert at_server == [Established(version, cipher, b"")]
    assert at_client == at_server


@pytest.mark.parametrize("context", [TLS12, ECDHE, TLS13])
def test_wrong_key_and_unknown_identity_fail_alike(context: ClientContext) -> None:
    said = []
    for keys in (keys_of(key=OTHER_KEY), keys_of(identity=b"who")):
        client, server = ClientSession(context, keys), ServerSession(Policy())
        at_client, at_server = converse(client, server)
        refused = failure(at_server)
        assert isinstance(refused, TlsFailure)
        assert refused.is_wrong_key
        told = failure(at_client)
        assert isinstance(told, TlsFailure)
        said.append(told.alert_received)
    assert said[0] == said[1]
    assert said[0] in (20, 51)


def test_a_hint_is_sent_in_tls12_and_never_empty() -> None:
    hints: list[bytes | None] = []

    def keys(hint: bytes | None) -> tuple[bytes, bytes, str]:
        hints.append(hint)
        return b"dev", KEY, "sha256"

    for hint in ("realm-hint", None, ""):
        connect(TLS12, keys, Policy(hint=hint))
    assert hints == [b"realm-hint", None, None]


def test_a_client_may_give_up_on_an_unknown_hint() -> None:
    client, server = ClientSession(TLS12, lambda _hint: None), ServerSession(Policy())
    _, at_server = converse(client, server)
    assert not server.is_open
    assert not client.is_open
    error = failure(at_server)
    assert isinstance(error, TlsFailure)
    assert error.alert_received is not None


def test_tls13_without_a_psk_falls_back_to_tls12() -> None:
    """The hello offers 1.3 without pre_shared_key beside 1.2 PSK suites: decision 4."""
    client, server = (
        ClientSession(BOTH, lambda hint: None if hint is None else (b"dev", KEY, "sha256")),
        ServerSession(Policy()),
    )
    _, at_server = converse(client, server)
    assert [type(event) for event in at_server] == [Established]
    assert server.hello is not None
    assert server.hello.offers_tls13
    established = at_server[0]
    assert isinstance(established, Established)
    assert established.version == "TLSv1.2"


def test_tls13_without_forward_secrecy_falls_back_to_tls12() -> None:
    """The hello offers its identity for psk_ke alone, beside PSK suites of TLS 1.2."""
    vector = Path(__file__).parents[1] / "wire" / "vectors" / "gnutls-psk-ke.hex"
    policy = Policy(known={b"device-1": (KEY, "sha256")})
    server = ServerSession(policy)
    assert server.receive(bytes.fromhex(vector.read_text())) == ()
    assert policy.asked == []
    server_hello = server.output()[5:]
    assert (server_hello[0], server_hello[4:6]) == (2, b"\x03\x03")
    assert server_hello[38:41] == b"\0\0\xa8"  # no session id, PSK-AES128-GCM-SHA256


def test_tls13_alone_without_a_psk_is_refused() -> None:
    client, server = ClientSession(TLS13, lambda _hint: None), ServerSession(Policy())
    error = failure(converse(client, server)[1])
    assert isinstance(error, TlsFailure)
    assert error.is_no_shared_cipher


def test_a_credential_bound_to_sha384() -> None:
    policy = Policy(known={b"dev": (KEY, "sha384")})
    client, server = ClientSession(TLS13, keys_of(hash_name="sha384")), ServerSession(policy)
    _, at_server = converse(client, server)
    assert at_server == [Established("TLSv1.3", "TLS_AES_256_GCM_SHA384", b"")]


def test_modern_refuses_plain_psk() -> None:
    client, server = ClientSession(TLS12, keys_of()), ServerSession(Policy(profile=ProfileName.MODERN))
    at_client, at_server = converse(client, server)
    error, told = failure(at_server), failure(at_client)
    assert isinstance(error, TlsFailure)
    assert error.is_no_shared_cipher
    assert isinstance(told, TlsFailure)
    assert told.alert_received == 40


def test_only_the_chosen_identity_has_a_key() -> None:
    """OpenSSL may ask for any offered identity, also after a HelloRetryRequest: only one is answered."""
    server = ServerSession(Policy(known={b"dev": (KEY, "sha256"), b"other": (OTHER_KEY, "sha256")}))
    client = ClientSession(TLS13, keys_of())
    server.receive(client.output())
    assert server._chosen_key(b"other") is None
    assert server._chosen_key(b"dev\0") is None


def test_alpn_takes_the_servers_first_choice() -> None:
    for offered, expected in (((b"mqtt", b"lines"), b"lines"), ((b"other",), b"")):
        context = ClientContext((), ("TLS_AES_128_GCM_SHA256",), lowest=TlsVersion.TLS1_3, alpn=offered)
        client, server = ClientSession(context, keys_of()), ServerSession(Policy(alpn=(b"lines", b"mqtt")))
        _, at_server = converse(client, server)
        established = at_server[0]
        assert isinstance(established, Established)
        assert established.alpn == expected


def test_sni_reaches_the_hello() -> None:
    server = ServerSession(Policy())
    server.receive(ClientSession(TLS13, keys_of(), "Gateway.Example").output())
    assert server.hello is not None
    assert server.hello.server_name == "gateway.example"


@pytest.mark.parametrize("context", [TLS12, TLS13])
@pytest.mark.parametrize("size", [1, 16384, 16385, 1_000_000])
def test_data_both_ways(context: ClientContext, size: int) -> None:
    client, server = connect(context, keys_of(), Policy())
    payload = bytes(itertools.islice(itertools.cycle(range(251)), size))
    client.send(payload)
    _, at_server = converse(client, server)
    server.send(payload)
    at_client, _ = converse(client, server)
    for events in (at_client, at_server):
        assert b"".join(event for event in events if isinstance(event, bytes)) == payload
        assert all(isinstance(event, bytes) for event in events)


@pytest.mark.parametrize("context", [TLS12, TLS13])
def test_each_side_ends_on_its_own(context: ClientContext) -> None:
    client, server = connect(context, keys_of(), Policy())
    client.close()
    assert converse(client, server)[1] == [PeerClosed()]
    assert server.is_open
    server.send(b"last words")
    server.close()
    assert converse(client, server)[0] == [b"last words", PeerClosed()]
    assert not client.is_open


def test_data_and_close_in_one_flight() -> None:
    client, server = connect(TLS12, keys_of(), Policy())
    client.send(b"one")
    client.send(b"two")
    client.close()
    assert converse(client, server)[1] == [b"onetwo", PeerClosed()]


@pytest.mark.parametrize("context", [TLS12, TLS13])
@pytest.mark.parametrize("whole", [False, True], ids=["first", "after a whole record"])
def test_records_that_come_in_pieces_lose_nothing(context: ClientContext, whole: bool) -> None:
    """Two records and a close, cut in two at every byte, from where OpenSSL stands between two records or may not."""
    at = 0
    while True:
        client, server = connect(context, keys_of(), Policy())
        if whole:
            for _ in range(2):
                client.send(b"zero")
                assert converse(client, server)[1] == [b"zero"]
        client.send(b"one")
        client.send(b"two")
        client.close()
        flight = client.output()
        *data, end = [*server.receive(flight[:at]), *server.receive(flight[at:])]
        assert b"".join(each for each in data if isinstance(each, bytes)) == b"onetwo"
        assert end == PeerClosed()
        assert not server.output()
        if at == len(flight):
            return
        at += 1


def test_a_corrupted_record_ends_the_session_with_an_alert() -> None:
    client, server = connect(TLS12, keys_of(), Policy())
    client.send(b"data")
    record = bytearray(client.output())
    record[-1] ^= 1
    error = failure(server.receive(bytes(record)))
    assert isinstance(error, TlsFailure)
    told = failure(client.receive(server.output()))
    assert isinstance(told, TlsFailure)
    assert told.alert_received == 20


@pytest.mark.parametrize(
    ("data", "fault", "alert"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", PeerFault.NOT_TLS, b""),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", None, b"\x15\x03\x01\x00\x02\x02"),
    ],
)
def test_what_is_no_hello_is_answered_without_openssl(
    data: bytes, fault: PeerFault | None, alert: bytes
) -> None:
    server = ServerSession(Policy())
    error = failure(server.receive(data))
    assert isinstance(error, PeerError)
    assert fault is None or error.fault is fault
    assert server.output()[:6] == alert
    assert server.output() == b""
    assert server.receive(b"more") == ()


def test_an_error_in_the_policy_reaches_the_caller() -> None:
    class Broken(Policy):
        def choose_psk(self, offered: Sequence[OfferedPsk]) -> PskChoice | None:
            raise ZeroDivisionError(len(offered))

    for context in (TLS12, TLS13):
        client, server = ClientSession(context, keys_of()), ServerSession(Broken())
        with pytest.raises(ZeroDivisionError):
            converse(client, server)


def test_a_ticket_from_an_earlier_session_is_no_identity_for_openssl() -> None:
    """OpenSSL sends tickets in TLS 1.3 whatever we say; with no cache they must lead nowhere."""
    policy = Policy()
    connect(TLS13, keys_of(), policy)
    assert policy.asked == [(b"dev",)]


def test_keys_are_dropped_after_the_handshake() -> None:
    _, server = connect(TLS13, keys_of(), Policy())
    assert server._choice is None
    assert server._engine is not None
    assert server._engine.find_key is None
    assert "0001020304" not in repr(PskChoice(b"dev", KEY, "sha256")).replace("\\x", "")


@pytest.mark.parametrize("size", [600, 100_000])
def test_grown_buffers_are_replaced(size: int) -> None:
    """A session that moved much, in pieces of any size, must not stay large: its memory BIOs are new afterwards."""
    client, server = connect(TLS12, keys_of(), Policy())
    assert server._engine is not None
    before = server._engine._into_ssl
    client.send(bytes(size))
    converse(client, server)
    assert server._engine._into_ssl != before
    before = server._engine._into_ssl
    server.send(bytes(size))
    converse(client, server)
    assert server._engine._into_ssl != before
    client.send(b"still works")
    assert converse(client, server)[1] == [b"still works"]


SMALL_MESSAGES = """
import os
from tests.support.memory import resident_bytes
from tests.unit.tls.test_session import TLS12, Policy, connect, converse, keys_of

sessions = [connect(TLS12, keys_of(), Policy()) for _ in range(500)]
before = resident_bytes(os.getpid())
for client, server in sessions:
    client.send(bytes(130))
    converse(client, server)
    server.send(bytes(130))
    converse(client, server)
print(resident_bytes(os.getpid()) - before)
"""


def test_small_messages_make_no_session_grow() -> None:
    """500 at both ends, in a process of its own, whose heap is new: memory BIOs that grow take 370 KiB."""
    ran = subprocess.run(
        [sys.executable, "-c", SMALL_MESSAGES],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(ran.stdout) < 100 * 1024


def test_a_client_that_has_no_key_leaves_nothing_behind() -> None:
    """In TLS 1.3 it is asked for its key before there is a session that anybody could free; each would hold some 20 KB."""

    def no_key(_hint: bytes | None) -> None:
        raise ZeroDivisionError

    before = resident_bytes(os.getpid())
    for _ in range(2000):
        with pytest.raises(ZeroDivisionError):
            ClientSession(TLS13, no_key)
    for _ in range(2000):
        with pytest.raises(UnicodeError):
            ClientSession(TLS13, keys_of(), "a" * 64)  # no label of a name is so long
    assert resident_bytes(os.getpid()) - before < 8_000_000
