"""A listener as a worker has it: which realm and which contexts a hello gets, and what is counted."""

from collections.abc import Callable

from gateway.registry.records import RealmRecord
from gateway.server.admission.lookup import DeviceLookup
from gateway.server.networks import NetworkList
from gateway.server.settings import ListenerSettings
from gateway.telemetry.metrics import Outcome, WorkerMetrics
from gateway.tls.contexts import ContextStore, RealmContexts
from gateway.tls.profiles import ProfileName

__all__ = ["Listener"]


class Listener:
    """One address that devices connect to. `alpn` are the protocols that its routes ask for, best first."""

    def __init__(
        self,
        settings: ListenerSettings,
        alpn: tuple[bytes, ...],
        lookup: DeviceLookup,
        contexts: ContextStore,
        metrics: WorkerMetrics,
    ) -> None:
        self.name = settings.name
        self.connections = 0
        self.balancers = NetworkList(settings.proxy_protocol_from)
        """Who says by a PROXY header whose a connection is."""
        self._settings = settings
        self._profile = ProfileName(settings.profile)
        self._lookup = lookup
        self._contexts = contexts
        self._alpn = alpn
        self._handshakes = metrics.handshakes
        self._bound: dict[tuple[Outcome, str, str], Callable[[], None]] = {}
        self.observe_handshake = metrics.handshake_duration.observe
        metrics.connections.labels(settings.name).set_function(lambda: self.connections)

    def change(self, settings: ListenerSettings, alpn: tuple[bytes, ...]) -> None:
        """Take other settings; they hold for hellos that come from now on."""
        self._settings = settings
        self.balancers = NetworkList(settings.proxy_protocol_from)
        self._profile = ProfileName(settings.profile)
        self._alpn = alpn

    def realm_for(self, server_name: str | None) -> RealmRecord | None:
        """The realm of a hello, by its SNI; None while the configured realm does not exist."""
        name = self._settings.realm
        if server_name is not None and self._settings.realms_by_sni:
            name = self._settings.realms_by_sni.get(server_name, name)
        return self._lookup.realms.get(name)

    @property
    def settings(self) -> ListenerSettings:
        """As configured."""
        return self._settings

    def contexts_for(self, realm: RealmRecord | None, *, is_watched: bool = False) -> RealmContexts:
        """The contexts of a realm; without one, those without a hint, where every identity is unknown."""
        hint, record_bytes_max = (None, None) if realm is None else (realm.hint, realm.record_bytes_max)
        return self._contexts.contexts(
            self._profile,
            hint,
            self._alpn,
            record_bytes_max,
            self._settings.allow_dhe_psk,
            is_watched=is_watched,
        )

    def count_handshake(self, outcome: Outcome, tls_version: str, cipher: str) -> None:
        """Count one handshake that ended."""
        key = (outcome, tls_version, cipher)
        count = self._bound.get(key)
        if count is None:
            count = self._bound[key] = self._handshakes.labels(
                self.name, outcome.value, tls_version, cipher
            ).inc
        count()
