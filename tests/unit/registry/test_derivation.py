"""Derived keys against published vectors and OpenSSL's own command."""

import base64
import shutil
import subprocess

import pytest

from gateway.errors import RegistryRefused
from gateway.registry.derivation import derive_key

SECRET = bytes(range(32))


def test_hmac_is_that_of_rfc_4231() -> None:
    key = derive_key("derived-hmac", b"Jefe", b"what do ya want for nothing?")
    assert key.hex() == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"


def test_hmac_is_the_way_of_azure_dps() -> None:
    """As its documentation computes it: base64(HMAC-SHA256(base64-decoded group key, registration id))."""
    group_key = base64.b64encode(SECRET).decode()
    script = 'printf %s "$2" | openssl dgst -sha256 -mac HMAC -macopt hexkey:$(printf %s "$1" | base64 -d | od -An -tx1 | tr -d " \\n") -binary | base64'
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    done = subprocess.run(
        ["sh", "-c", script, "sh", group_key, "sn-007-888-abc"], capture_output=True, check=True
    )
    assert base64.b64decode(done.stdout) == derive_key("derived-hmac", SECRET, b"sn-007-888-abc")


def test_hkdf_is_that_of_rfc_5869() -> None:
    """A.3: no salt, no info, here its first 32 of 42 bytes."""
    key = derive_key("derived-hkdf", b"\x0b" * 22, b"")
    assert key.hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_hkdf_is_that_of_openssl() -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    options = ["digest:SHA256", f"hexkey:{SECRET.hex()}", "info:meter-1"]
    command = [openssl, "kdf", "-keylen", "32", "-binary"]
    command += [part for option in options for part in ("-kdfopt", option)]
    done = subprocess.run([*command, "HKDF"], capture_output=True, check=True)
    assert done.stdout == derive_key("derived-hkdf", SECRET, b"meter-1")


def test_keys_differ_by_identity_secret_and_way() -> None:
    keys = {
        derive_key(way, secret, identity)
        for way in ("derived-hmac", "derived-hkdf")
        for secret in (SECRET, bytes(32))
        for identity in (b"a", b"b")
    }
    assert len(keys) == 8
    assert all(len(key) == 32 for key in keys)


def test_a_way_of_another_version_gives_no_key() -> None:
    with pytest.raises(RegistryRefused, match="not known to this version"):
        derive_key("derived-argon", SECRET, b"a")
