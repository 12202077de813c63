"""A fix for every outcome, as exact as the facts allow."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.records import CredentialRecord
from gateway.server.admission.advice import GENERAL, Facts, advice
from gateway.server.settings import Address, ListenerSettings
from gateway.telemetry.metrics import Outcome
from gateway.wire.client_hello import ClientHello
from gateway.wire.suites import suite_code

TROUBLESHOOTING = Path(__file__).parents[4] / "docs" / "troubleshooting.md"


def listener(name: str = "tls", **settings: Any) -> ListenerSettings:
    return ListenerSettings(name=name, bind=Address("127.0.0.1", 8883), **settings)


def hello(*suites: str, versions: tuple[int, ...] = (0x0303,), server_name: str | None = None) -> ClientHello:
    codes = tuple(suite_code(suite) for suite in suites)
    return ClientHello(0x0303, versions, codes, server_name, (), (), ())


RECORD = CredentialRecord(
    credential_id=1, device_id=1, realm_id=1, device="meter 1", group=None, labels={}, disabled=False, revoked=False,
    not_before=1_800_000_000, not_after=1_700_000_000, networks=("10.0.0.0/8", "2001:db8::/32"), hash="sha256",
    sealed_key=b"",
)  # fmt: skip
FACTS = Facts(
    listener=listener(),
    listeners=(listener(),),
    address="192.0.2.7",
    realm="plant",
    hello=hello("PSK-AES128-GCM-SHA256"),
    identity="meter 1",
    record=RECORD,
    handshake_timeout_s=10,
)
NOTHING = dataclasses.replace(FACTS, hello=None, identity="", record=None)


@pytest.mark.parametrize("facts", [FACTS, NOTHING, dataclasses.replace(FACTS, realm=None, record=None)])
@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_but_ok_has_a_fix_of_one_line(outcome: Outcome, facts: Facts) -> None:
    text = advice(outcome, facts)
    assert bool(text) == (outcome is not Outcome.OK)
    assert "\n" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome.NOT_YET_VALID, "it begins 2027-01-15T08:00:00Z"),
        (Outcome.EXPIRED, "it ended 2023-11-14T22:13:20Z"),
        (Outcome.ADDRESS_REFUSED, "it came from 192.0.2.7 and may come from 10.0.0.0/8, 2001:db8::/32"),
        (Outcome.WRONG_KEY, "rotate-key --realm plant -- 'meter 1'"),
        (Outcome.DISABLED, "enable-device --realm plant -- 'meter 1'"),
        (Outcome.REVOKED, "rotate-key --realm plant -- 'meter 1'"),
        (Outcome.UNKNOWN_IDENTITY, "another hash than sha256"),
        (Outcome.TIMEOUT, "not done in 10 s"),
    ],
)
def test_what_is_known_is_said(outcome: Outcome, said: str) -> None:
    assert said in advice(outcome, FACTS)


def test_an_unknown_identity_is_added_or_sent_to_its_realm() -> None:
    facts = dataclasses.replace(
        FACTS, record=None, hello=hello("PSK-AES128-CCM8", server_name="plant.example")
    )
    text = advice(Outcome.UNKNOWN_IDENTITY, facts)
    assert "add-device --realm plant -- 'meter 1'" in text
    assert "by the server name plant.example" in text
    no_realm = advice(Outcome.UNKNOWN_IDENTITY, dataclasses.replace(facts, realm=None))
    assert "the realm default of listener tls does not exist" in no_realm


@pytest.mark.parametrize(
    ("settings", "offered", "said"),
    [
        ({}, ["PSK-AES128-CCM8"], 'profile = "constrained" on listener tls allows PSK-AES128-CCM8'),
        ({"profile": "modern"}, ["PSK-AES128-GCM-SHA256", "PSK-NULL-SHA"],
         'profile = "compatible" on listener tls allows PSK-AES128-GCM-SHA256'),
        ({}, ["DHE-PSK-AES128-GCM-SHA256"], "allow_dhe_psk = true on listener tls allows DHE-PSK-AES128-GCM-SHA256"),
        ({}, ["PSK-NULL-SHA"], "no profile allows anything of what it offers: enable one of TLS_AES_128_GCM_SHA256, "),
    ],
)  # fmt: skip
def test_no_shared_cipher_names_what_to_enable_where(
    settings: dict[str, Any], offered: list[str], said: str
) -> None:
    mine = listener(**settings)
    facts = dataclasses.replace(FACTS, listener=mine, listeners=(mine,), hello=hello(*offered))
    assert advice(Outcome.NO_SHARED_CIPHER, facts).startswith(said)


def test_no_shared_cipher_names_a_listener_that_takes_the_device_as_it_is() -> None:
    facts = dataclasses.replace(
        FACTS,
        listeners=(listener(), listener("small", profile="constrained")),
        hello=hello("PSK-AES128-CCM8"),
    )
    assert advice(Outcome.NO_SHARED_CIPHER, facts).endswith(
        ", or let it connect to listener small (127.0.0.1:8883), which allows it"
    )


def test_tls13_alone_without_a_psk_is_told_apart() -> None:
    facts = dataclasses.replace(FACTS, hello=hello("TLS_AES_128_GCM_SHA256", versions=(0x0304,)))
    assert "TLS 1.3 alone and no pre-shared key" in advice(Outcome.NO_SHARED_CIPHER, facts)


def test_the_page_has_the_fix_of_every_outcome() -> None:
    rows = [f"| `{outcome}` | {GENERAL[outcome]} |" for outcome in Outcome if outcome is not Outcome.OK]
    table = "\n".join(rows)
    assert table in TROUBLESHOOTING.read_text(), f"put this into {TROUBLESHOOTING.name}:\n{table}"
