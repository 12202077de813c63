"""Does the TLS library shake hands, for each profile in use and each version?"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.cli.checks.finding import Finding

if TYPE_CHECKING:
    from gateway.config import GatewaySettings
    from gateway.tls.session import ClientSession, ServerSession

__all__ = ["check_tls"]


def check_tls(settings: "GatewaySettings") -> Iterator[Finding]:
    """A handshake in memory for each profile in use and each version of TLS."""
    from gateway.tls.openssl import ClientContext, TlsVersion, library_version
    from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName

    fix = "reinstall pyopenssl and cryptography: pip install --force-reinstall pyopenssl cryptography"
    for name in sorted({listener.profile for listener in settings.listeners}):
        profile = PROFILES[ProfileName(name)]
        clients: dict[str, Callable[[], ClientContext]] = {
            "TLSv1.2": lambda suites=profile.tls12_suites: ClientContext(
                suites, (), highest=TlsVersion.TLS1_2
            ),  # type: ignore[misc]  # a default keeps this loop's value
            "TLSv1.3": lambda: ClientContext((), TLS13_SUITES["sha256"], lowest=TlsVersion.TLS1_3),
        }
        for version, make in clients.items():
            try:
                agreed = _shake_hands(make(), ProfileName(name))
            except Exception as exc:  # noqa: BLE001 -- whatever a broken library raises is a finding
                yield Finding("tls", "error", f"profile {name}, {version}: {exc or type(exc).__name__}", fix)
            else:
                yield Finding("tls", "ok", f"profile {name}: {agreed} ({library_version()})")


class _TestPolicy:
    """A registry of one device whose key everybody may know: it never leaves the memory."""

    def __init__(self, profile: Any) -> None:
        from gateway.tls.contexts import ContextStore

        self._contexts = ContextStore().contexts(profile, "doctor", ())

    def contexts_for(self, _hello: Any) -> Any:
        return self._contexts

    def choose_psk(self, offered: Sequence[Any]) -> Any:
        from gateway.tls.session import PskChoice

        return PskChoice(offered[0].identity, _TEST_KEY, "sha256")


_TEST_KEY: Final = bytes(range(32))


def _shake_hands(context: Any, profile: Any) -> str:
    from gateway.tls.session import ClientSession, Established, Failed, ServerSession

    client = ClientSession(context, lambda _hint: (b"doctor", _TEST_KEY, "sha256"))
    server = ServerSession(_TestPolicy(profile))
    try:
        for event in _converse(client, server):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Established):
                return f"{event.version} with {event.cipher} works"
    finally:
        client.free()
        server.free()
    raise AssertionError("the handshake stopped halfway")


def _converse(client: "ClientSession", server: "ServerSession") -> Iterator[Any]:
    while True:
        up = client.output()
        if up:
            yield from server.receive(up)
        down = server.output()
        if down:
            yield from client.receive(down)
        if not up and not down:
            return
