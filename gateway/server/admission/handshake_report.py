"""What is said of a handshake that failed: one outcome for the metrics, and the fields that help an operator."""

from gateway.errors import PeerError, PeerFault
from gateway.server.admission.lookup import Resolution
from gateway.telemetry.metrics import Outcome
from gateway.tls.openssl import TlsFailure
from gateway.tls.session import ServerSession
from gateway.wire.suites import suite_name

__all__ = ["failure_fields", "outcome_of"]


def outcome_of(error: PeerError | TlsFailure, resolution: Resolution | None) -> Outcome:
    """How a handshake ended that ended with `error`; a decoy's wrong key is what led to the decoy."""
    if isinstance(error, PeerError):
        is_identity = error.fault is PeerFault.UNKNOWN_PSK_IDENTITY
        return Outcome.UNKNOWN_IDENTITY if is_identity else Outcome.PROTOCOL_ERROR
    if error.is_wrong_key:
        return (
            Outcome.WRONG_KEY
            if resolution is None or resolution.outcome is Outcome.OK
            else resolution.outcome
        )
    if error.is_no_shared_cipher:
        return Outcome.NO_SHARED_CIPHER
    return Outcome.PEER_CLOSED if error.is_peer_closed else Outcome.PROTOCOL_ERROR


def failure_fields(
    outcome: Outcome, resolution: Resolution | None, session: ServerSession
) -> dict[str, object]:
    """Who it was, as far as that is known, and what was offered where nothing of it is allowed."""
    fields: dict[str, object] = {}
    if resolution is not None:
        fields["identity"] = resolution.identity.decode("utf-8", "backslashreplace")
    hello = session.hello
    if hello is not None:
        fields["server_name"] = hello.server_name
        if outcome is Outcome.NO_SHARED_CIPHER and session.contexts is not None:
            fields["offered"] = [suite_name(code) for code in hello.suites]
            fields["allowed"] = session.contexts.suites
    return fields
