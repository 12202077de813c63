"""Contexts and profiles."""

import pytest

from gateway.errors import ConfigurationError
from gateway.tls.contexts import ContextStore
from gateway.tls.openssl import ServerContext, TlsVersion, library_version
from gateway.tls.profiles import PROFILES, TLS13_SUITES, ProfileName


def test_contexts_are_shared_by_hint() -> None:
    store = ContextStore()
    one = store.contexts(ProfileName.COMPATIBLE, "a", ())
    assert store.contexts(ProfileName.COMPATIBLE, "a", ()) is one
    assert store.contexts(ProfileName.COMPATIBLE, "b", ()) is not one
    assert store.contexts(ProfileName.MODERN, "a", ()) is not one
    assert store.contexts(ProfileName.COMPATIBLE, "", ()) is store.contexts(ProfileName.COMPATIBLE, None, ())
    assert one.tls12 is one.tls12
    assert one.tls13("sha256") is one.tls13("sha256")


def test_only_hellos_without_a_common_signature_get_another_context() -> None:
    contexts = ContextStore().contexts(ProfileName.MODERN, None, ())
    assert contexts.tls12_for(()) is contexts.tls12
    assert contexts.tls12_for((0x0203, 0x0403)) is contexts.tls12
    assert contexts.tls12_for((0x0203, 0x0201)) is contexts.tls12_for((0x0807,)) is not contexts.tls12


def test_contexts_of_gone_hints_are_forgotten() -> None:
    store = ContextStore()
    kept, gone = (store.contexts(ProfileName.COMPATIBLE, hint, ()) for hint in ("kept", "gone"))
    small = store.contexts(ProfileName.COMPATIBLE, "kept", (), 512)
    store.keep([("kept", None), (None, None)])
    assert store.contexts(ProfileName.COMPATIBLE, "kept", (), 512) is not small
    assert store.contexts(ProfileName.COMPATIBLE, "kept", ()) is kept
    assert store.contexts(ProfileName.COMPATIBLE, "gone", ()) is not gone


@pytest.mark.parametrize("profile", list(ProfileName))
def test_every_suite_of_a_profile_is_there_and_safe(profile: ProfileName) -> None:
    for suite in PROFILES[profile].tls12_suites:
        ServerContext(TlsVersion.TLS1_2, (suite,))
        assert "PSK" in suite
        assert not any(weak in suite for weak in ("NULL", "RC4", "3DES", "DHE-PSK-AES128-GCM"))
    assert PROFILES[ProfileName.MODERN].tls12_suites == ("ECDHE-PSK-CHACHA20-POLY1305",)
    assert "CBC" in PROFILES[ProfileName.COMPATIBLE].tls12_suites[-1]


def test_tls13_suites_go_by_hash() -> None:
    for name, suites in TLS13_SUITES.items():
        assert all(suite.endswith(name.upper()) for suite in suites)
        ServerContext(TlsVersion.TLS1_3, suites)


def test_a_suite_that_openssl_does_not_know_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="NO-SUCH-SUITE"):
        ServerContext(TlsVersion.TLS1_2, ("NO-SUCH-SUITE",))


def test_a_hint_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="128 bytes"):
        ServerContext(TlsVersion.TLS1_2, ("PSK-AES128-GCM-SHA256",), hint="x" * 1000)


def test_the_library_tells_its_version() -> None:
    assert library_version().startswith("OpenSSL ")
