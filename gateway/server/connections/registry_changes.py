"""What a change of the registry means for a worker: what it looks up in, and who of its devices may stay."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gateway.errors import ControlError, RegistryError
from gateway.registry.notices import Changed, Published
from gateway.server.admission.lookup import NEWCOMER, DeviceLookup, refusal
from gateway.server.connections.connection import DeviceConnection
from gateway.server.connections.life import SessionLife
from gateway.server.sessions.commands import CommandSender
from gateway.server.sessions.index import SessionIndex
from gateway.telemetry.metrics import Outcome
from gateway.tls.contexts import ContextStore

__all__ = ["RegistryChanges"]


class RegistryChanges:
    """Args: what the worker owns that depends on the registry, and who counts how long a revocation took."""

    def __init__(
        self,
        *,
        lookup: DeviceLookup,
        contexts: ContextStore,
        sessions: SessionIndex[DeviceConnection],
        life: SessionLife,
        commands: CommandSender,
        observe_revocation: Callable[[float], None],
    ) -> None:
        self._lookup = lookup
        self._contexts = contexts
        self._sessions = sessions
        self._life = life
        self._commands = commands
        self._observe_revocation = observe_revocation
        self._sequence = 0

    def published(self, published: Published) -> None:
        """There is a new generation of the replica. Raises ControlError when it cannot be read."""
        # A follower that was started again lacks what it could not write: what was revoked stays revoked.
        is_older = published.sequence < self._sequence
        try:
            self._lookup.publish(Path(published.path), keep_overlay=is_older)
        except RegistryError as exc:
            raise ControlError(str(exc)) from exc
        self._keep_contexts()
        self._check(self._sessions, None)
        self._life.changed(time.time(), realms=True)
        for session in self._sessions:
            self._commands.connected(session)

    def changed(self, change: Changed) -> None:
        """The replica has changed, or what stands in memory in its place."""
        self._sequence = change.sequence
        self._lookup.replace_overlay(change.overlay)
        if not self._lookup.is_ready:  # the replica that lacks all this follows
            return
        if change.realms:
            self._lookup.reload_realms()
            self._keep_contexts()
        self._check(self._sessions.of_devices(change.devices), change.committed_at)
        self._life.changed(time.time(), realms=change.realms)
        self._commands.changed(change.devices, self._sessions.of_devices(change.devices))

    def _keep_contexts(self) -> None:
        self._contexts.keep((realm.hint, realm.record_bytes_max) for realm in self._lookup.realms.values())

    def _check(self, sessions: Iterable[DeviceConnection], committed_at: float | None) -> None:
        """Evaluate again what let these devices in, and stop those that would not come in now."""
        now = time.time()
        for session in sessions:
            if session.device_id == NEWCOMER:
                continue
            record = self._lookup.record(session.realm_id, session.identity.encode("utf-8"))
            if record is None or record.credential_id != session.credential_id:
                reason = "removed"
            elif (outcome := refusal(record, session.address, now)) is not Outcome.OK:
                reason = outcome.value
            else:
                self._life.file_end(session, record.not_after)
                continue
            session.stop(reason)
            if committed_at is not None:
                self._observe_revocation(max(0.0, time.time() - committed_at))
