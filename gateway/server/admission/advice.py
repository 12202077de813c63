"""What to do about a handshake that failed: a line for every outcome, as exact as what is known of the device allows.

Pure: facts in, text out. `GENERAL` is what docs/troubleshooting.md has too.
"""

import dataclasses
import datetime as dt
import shlex
from collections.abc import Callable, Sequence
from typing import Final

from gateway.registry.records import CredentialRecord
from gateway.server.settings import ListenerSettings
from gateway.telemetry.metrics import Outcome
from gateway.tls.profiles import DHE_PSK_SUITES, PROFILES, TLS13_SUITES, ProfileName
from gateway.wire.client_hello import TLS_1_2, ClientHello
from gateway.wire.suites import suite_name

__all__ = ["GENERAL", "Facts", "advice"]


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a handshake when it ended. `record` is of the identity that was offered, if there is one."""

    listener: ListenerSettings
    listeners: Sequence[ListenerSettings]
    address: str
    realm: str | None
    hello: ClientHello | None
    identity: str
    record: CredentialRecord | None
    handshake_timeout_s: float


GENERAL: Final = {
    Outcome.OK: "",
    Outcome.UNKNOWN_IDENTITY: "add the device with `add-device`, or look at its realm: the server name (SNI) it sends, "
    "`realms_by_sni` and `realm` of the listener",
    Outcome.WRONG_KEY: "compare the device's key with the one it was added with (some clients cut long keys short, some take hex "
    "for text), or give it a new one: `rotate-key`",
    Outcome.DISABLED: "let it in again with `enable-device`, if it is to come in",
    Outcome.REVOKED: "give it a new identity and key with `rotate-key`; where its realm derives keys, `add-device` adds it again",
    Outcome.EXPIRED: "`update-device --not-after TIME` for longer, or `rotate-key`; a credential that was idle for longer than the "
    "`idle_days` of its realm comes back with `rotate-key`",
    Outcome.NOT_YET_VALID: "wait, or `update-device --not-before TIME`; a clock that is wrong looks the same: `doctor`",
    Outcome.ADDRESS_REFUSED: "`update-device --allow-from CIDR` with the network it comes from; behind a balancer the gateway "
    "sees the balancer's address unless it gets the PROXY protocol",
    Outcome.RATE_LIMITED: "raise the bound of `[limits]` that the reason names, or find out who connects so often",
    Outcome.NO_SHARED_CIPHER: "enable one of the allowed suites in the device, or a profile that allows what it offers on the "
    "listener",
    Outcome.NO_ROUTE: "add a route whose `match` fits this device, or widen one",
    Outcome.TIMEOUT: "look at the network between, and whether the device is fast enough for `limits.handshake_timeout_s`",
    Outcome.PEER_CLOSED: "look into the device's log: it went away or refused; the alert, if there is one, says why",
    Outcome.PROTOCOL_ERROR: "make sure that the device speaks TLS 1.2 or 1.3 on this port, and that nothing in between changes it",
    Outcome.REGISTRY_STALE: "bring the registry back: see `doctor`, and the log of the follower",
}
"""By outcome, where nothing more exact is known."""


def advice(outcome: Outcome, facts: Facts) -> str:
    """What to do about it, in one line; empty for what needs nothing."""
    exact = _EXACT.get(outcome)
    return (exact(facts) if exact is not None else "") or GENERAL[outcome]


def _unknown(facts: Facts) -> str:
    if facts.realm is None:
        return (
            f"the realm {facts.listener.realm} of listener {facts.listener.name} does not exist: `add-realm`, or name "
            "another in `realm`"
        )
    if facts.record is not None:
        return (
            f"it proves a key of another hash than {facts.record.hash}: let the device use a suite of {facts.record.hash}, or "
            "add it again with the other `--hash`"
        )
    server_name = None if facts.hello is None else facts.hello.server_name
    by = f"by the server name {server_name}" if server_name else "it sends no server name"
    return (
        f"`gatewayctl add-device --realm {facts.realm} -- {shlex.quote(facts.identity)}`, or send it to its own realm: this is {facts.realm} "
        f"({by}; see `realms_by_sni` and `realm` of listener {facts.listener.name})"
    )


def _wrong_key(facts: Facts) -> str:
    if facts.record is None:
        return ""
    return (
        f"the key of {facts.record.device} is another than the one it was added with: compare them, byte for byte in hex (some clients "
        f"cut long keys short, some take hex for text), or `gatewayctl rotate-key --realm {facts.realm} -- {shlex.quote(facts.record.device)}`"
    )


def _disabled(facts: Facts) -> str:
    return _command(facts, "enable-device", "if it is to come in")


def _revoked(facts: Facts) -> str:
    return _command(facts, "rotate-key", "for a new identity and key")


def _command(facts: Facts, command: str, why: str) -> str:
    if facts.record is None:
        return ""
    return f"`gatewayctl {command} --realm {facts.realm} -- {shlex.quote(facts.record.device)}`, {why}"


def _expired(facts: Facts) -> str:
    if facts.record is None or facts.record.not_after is None:
        return ""
    return f"it ended {_date(facts.record.not_after)}: `update-device --not-after TIME` for longer, or `rotate-key`"


def _not_yet_valid(facts: Facts) -> str:
    if facts.record is None or facts.record.not_before is None:
        return ""
    return (
        f"it begins {_date(facts.record.not_before)}: wait, or `update-device --not-before TIME`; if this date has passed, this "
        "node's clock is wrong: `doctor`"
    )


def _address_refused(facts: Facts) -> str:
    if facts.record is None:
        return ""
    return (
        f"it came from {facts.address} and may come from {', '.join(facts.record.networks)}: `update-device --allow-from CIDR`; "
        "behind a balancer the gateway sees the balancer's address unless it gets the PROXY protocol"
    )


def _timeout(facts: Facts) -> str:
    if facts.hello is None:
        return (
            "no whole ClientHello came: the device does not speak TLS on this port, or the network loses what it sends "
            "(large packets: try a smaller MTU)"
        )
    return (
        f"it was not done in {facts.handshake_timeout_s:g} s: look at the network, or raise `limits.handshake_timeout_s` for slow "
        "devices"
    )


def _peer_closed(facts: Facts) -> str:
    return (
        ""
        if facts.hello is not None
        else "it connected and said nothing: a port check, or a device that gave up"
    )


def _no_shared_cipher(facts: Facts) -> str:
    """Which profile on which listener would take something of what the device offers."""
    hello = facts.hello
    if hello is None:
        return ""
    if TLS_1_2 not in hello.versions and not hello.psks:
        return (
            "it offers TLS 1.3 alone and no pre-shared key: give its TLS library identity and key, with psk_dhe_ke, or let it "
            "offer TLS 1.2"
        )
    offered = [suite_name(code) for code in hello.suites]
    ways = [*_by_profile(facts, offered), *_by_listener(facts, offered)]
    if ways:
        return ", or ".join(ways)
    wanted = ", ".join(
        (*TLS13_SUITES["sha256"][:1], *PROFILES[ProfileName(facts.listener.profile)].tls12_suites[:2])
    )
    return f"no profile allows anything of what it offers: enable one of {wanted} in the device"


def _by_profile(facts: Facts, offered: Sequence[str]) -> list[str]:
    """What to change on this listener, the least first."""
    listener = facts.listener
    for name, profile in PROFILES.items():
        fitting = [suite for suite in offered if suite in profile.tls12_suites]
        if name.value != listener.profile and fitting:
            return [f'profile = "{name.value}" on listener {listener.name} allows {", ".join(fitting)}']
    fitting = [suite for suite in offered if suite in DHE_PSK_SUITES]
    if fitting and not listener.allow_dhe_psk:
        return [f"allow_dhe_psk = true on listener {listener.name} allows {', '.join(fitting)}"]
    return []


def _by_listener(facts: Facts, offered: Sequence[str]) -> list[str]:
    """Where else it could connect as things are."""
    for other in facts.listeners:
        if other.name == facts.listener.name:
            continue
        allowed = PROFILES[ProfileName(other.profile)].tls12_suites + (
            DHE_PSK_SUITES if other.allow_dhe_psk else ()
        )
        if any(suite in allowed for suite in offered):
            return [f"let it connect to listener {other.name} ({other.bind}), which allows it"]
    return []


def _date(unix_s: float) -> str:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_EXACT: Final[dict[Outcome, Callable[[Facts], str]]] = {
    Outcome.UNKNOWN_IDENTITY: _unknown,
    Outcome.WRONG_KEY: _wrong_key,
    Outcome.DISABLED: _disabled,
    Outcome.REVOKED: _revoked,
    Outcome.EXPIRED: _expired,
    Outcome.NOT_YET_VALID: _not_yet_valid,
    Outcome.ADDRESS_REFUSED: _address_refused,
    Outcome.NO_SHARED_CIPHER: _no_shared_cipher,
    Outcome.TIMEOUT: _timeout,
    Outcome.PEER_CLOSED: _peer_closed,
}
