"""What only some fleets need: short tags, finite-field DHE, credentials bound to SHA-384, and small records."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import pytest

from gateway.tls.contexts import ContextStore, RealmContexts
from gateway.tls.openssl import RECORD_BYTES, ClientContext, TlsFailure, TlsVersion
from gateway.tls.profiles import DHE_PSK_SUITES, PROFILES, TLS13_SUITES, ProfileName
from gateway.tls.session import (
    ClientSession,
    Established,
    Event,
    Failed,
    PskChoice,
    ServerSession,
)
from gateway.wire.client_hello import ClientHello, OfferedPsk

KEY = bytes(range(32))
STORE = ContextStore()
CONSTRAINED = STORE.contexts(ProfileName.CONSTRAINED, None, ())
COMPATIBLE = STORE.contexts(ProfileName.COMPATIBLE, None, ())


@dataclasses.dataclass
class Policy:
    """A registry that knows everybody."""

    contexts: RealmContexts
    hash_name: str = "sha256"

    def contexts_for(self, _hello: ClientHello) -> RealmContexts:
        return self.contexts

    def choose_psk(self, offered: Sequence[OfferedPsk]) -> PskChoice:
        return PskChoice(offered[0].identity, KEY, self.hash_name)


def connect(
    policy: Policy, suite: str, hash_name: str = "sha256"
) -> tuple[ServerSession, ClientSession, Event]:
    """A handshake of a client that offers this suite alone, and what the server says at its end."""
    is_tls13 = suite.startswith("TLS_")
    version = TlsVersion.TLS1_3 if is_tls13 else TlsVersion.TLS1_2
    tls12 = () if is_tls13 else (suite, "@SECLEVEL=0")
    context = ClientContext(tls12, (suite,) if is_tls13 else (), lowest=version, highest=version)
    client = ClientSession(context, lambda _hint: (b"device", KEY, hash_name))
    server = ServerSession(policy)
    events: list[Event] = []
    while up := client.output():
        events += server.receive(up)
        client.receive(server.output())
    return server, client, events[0]


def accepted(suite: str) -> Established:
    return Established("TLSv1.3" if suite.startswith("TLS_") else "TLSv1.2", suite, b"")


@pytest.mark.parametrize("suite", [*PROFILES[ProfileName.CONSTRAINED].tls12_suites, *TLS13_SUITES["sha256"]])
def test_constrained_takes_every_suite_of_its_list(suite: str) -> None:
    assert connect(Policy(CONSTRAINED), suite)[2] == accepted(suite)


def test_short_tags_are_for_constrained_alone() -> None:
    (short,) = set(PROFILES[ProfileName.CONSTRAINED].tls12_suites) - set(
        PROFILES[ProfileName.COMPATIBLE].tls12_suites
    )
    assert short == "PSK-AES128-CCM8"
    refused = connect(Policy(COMPATIBLE), short)[2]
    assert isinstance(refused, Failed)
    assert isinstance(refused.error, TlsFailure)
    assert refused.error.is_no_shared_cipher
    assert "PSK-AES256-CCM8" not in CONSTRAINED.tls12_suites


@pytest.mark.parametrize("suite", DHE_PSK_SUITES)
@pytest.mark.parametrize("profile", ProfileName)
def test_finite_field_dhe_is_taken_only_when_allowed(profile: ProfileName, suite: str) -> None:
    allowed = STORE.contexts(profile, "hint", (), allow_dhe_psk=True)
    assert connect(Policy(allowed), suite)[2] == accepted(suite)
    assert allowed.tls12_suites[-len(DHE_PSK_SUITES) :] == DHE_PSK_SUITES
    assert isinstance(connect(Policy(STORE.contexts(profile, "hint", ())), suite)[2], Failed)


def test_a_credential_bound_to_sha384_takes_its_own_suite_alone() -> None:
    policy = Policy(COMPATIBLE, "sha384")
    assert connect(policy, "TLS_AES_256_GCM_SHA384", "sha384")[2] == accepted("TLS_AES_256_GCM_SHA384")
    for suite in PROFILES[ProfileName.COMPATIBLE].tls12_suites:
        assert connect(policy, suite)[2] == accepted(suite)


def plaintext_sizes(records: bytes, overhead: int) -> Iterator[int]:
    """What each application-data record of this stream holds."""
    at = 0
    while at < len(records):
        size = int.from_bytes(records[at + 3 : at + 5])
        assert records[at] == 23
        yield size - overhead
        at += 5 + size


@pytest.mark.parametrize(
    ("suite", "overhead"),
    [
        ("PSK-AES128-GCM-SHA256", 8 + 16),  # explicit nonce and tag
        ("PSK-AES128-CCM8", 8 + 8),
        ("TLS_AES_128_GCM_SHA256", 1 + 16),  # content type and tag
    ],
)
@pytest.mark.parametrize("record_bytes_max", [64, 512, 1000, RECORD_BYTES, None])
def test_no_record_is_larger_than_the_bound(suite: str, overhead: int, record_bytes_max: int | None) -> None:
    contexts = STORE.contexts(ProfileName.CONSTRAINED, None, (), record_bytes_max)
    server, client, _ = connect(Policy(contexts), suite)
    server.output()
    payload = bytes(itertools.islice(itertools.cycle(range(251)), 40_000))
    server.send(payload)
    records = server.output()
    bound = record_bytes_max or RECORD_BYTES
    sizes = list(plaintext_sizes(records, overhead))
    assert sizes == [bound] * (len(payload) // bound) + [len(payload) % bound] * bool(len(payload) % bound)
    received = client.receive(records)
    assert b"".join(event for event in received if isinstance(event, bytes)) == payload
