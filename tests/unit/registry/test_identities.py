import unicodedata

import pytest
from hypothesis import given, strategies as st

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.sealing import Key


@pytest.mark.parametrize(
    "text", ["m", "a" * 128, "é" * 64, "meter 1", "urn:dev:mac:0024beff", "温度計-7", " x ", "a:b#c"]
)
def test_good_identities_stay_as_they_are(text: str) -> None:
    assert identities.parse_identity(text) == text
    assert identities.is_identity(text.encode())


BAD = {
    "": "the identity is empty",
    "a" * 129: "the identity has 129 bytes: at most 128 are allowed",
    "é" * 65: "the identity has 130 bytes: at most 128 are allowed",
    "a\x00b": r"the identity 'a\\x00b' has control characters",
    "a\nb": r"the identity 'a\\nb' has control characters",
    "\x7f": r"the identity '\\x7f' has control characters",
    "\x85": r"the identity '\\x85' has control characters",
    "a\udc80": "the identity is not UTF-8",
}


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_bad_identities_are_refused(text: str, message: str) -> None:
    with pytest.raises(RegistryRefused, match=message) as refusal:
        identities.parse_identity(text)
    assert str(refusal.value).isprintable()
    assert not identities.is_identity(text.encode("utf-8", "surrogateescape"))


@given(st.binary(max_size=140))
def test_any_bytes_are_an_identity_or_not(raw: bytes) -> None:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        assert not identities.is_identity(raw)
        return
    good = 1 <= len(raw) <= 128 and not any(unicodedata.category(letter) == "Cc" for letter in text)
    assert identities.is_identity(raw) == good


@given(st.text(max_size=140))
def test_what_is_parsed_is_what_the_wire_may_carry(text: str) -> None:
    try:
        parsed = identities.parse_identity(text)
    except RegistryRefused:
        assert not identities.is_identity(text.encode("utf-8", "surrogatepass"))
    else:
        assert identities.is_identity(parsed.encode())


def test_keys_are_read_from_hex() -> None:
    assert identities.parse_key_hex("00" * 16) == Key(bytes(16))
    assert (
        identities.parse_key_hex(" 0123456789ABCDEFabcdef0123456789\n").hex()
        == "0123456789abcdefabcdef0123456789"
    )
    assert len(identities.parse_key_hex("ff" * 64)) == 64


BAD_KEYS = {
    "": "the key has 0 bytes: 16 to 64 are allowed",
    "ab" * 15: "the key has 15 bytes: 16 to 64 are allowed",
    "ab" * 65: "the key has 65 bytes: at most 64 are allowed",
    "ab" * 16 + "c": "the key is not hex",
    "0x" + "ab" * 16: "the key is not hex",
    "ab " * 16: "the key is not hex",
    "secretsecretsecret": "the key is not hex",
    "é" * 32: "the key is not hex",
}


@pytest.mark.parametrize(("text", "message"), BAD_KEYS.items())
def test_bad_keys_are_refused_and_not_shown(text: str, message: str) -> None:
    with pytest.raises(RegistryRefused, match=message) as refusal:
        identities.parse_key_hex(text)
    assert not text or text not in str(refusal.value)


@pytest.mark.parametrize("parse", [identities.parse_realm_name, identities.parse_group])
def test_names(parse: object) -> None:
    assert callable(parse)
    for good in ("default", "a", "x" * 64, "Plant 7", "werk-süd"):
        assert parse(good) == good
    for bad in ("", "x" * 65, " a", "a ", "a\tb", "\udcff"):
        with pytest.raises(RegistryRefused):
            parse(bad)


def test_labels_are_sorted() -> None:
    assert list(identities.parse_labels({"b": "1", "a": "ä b", "c/d.e_f-1": ""}).items()) == [
        ("a", "ä b"),
        ("b", "1"),
        ("c/d.e_f-1", ""),
    ]


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"a b": "x"},
        {"-a": "x"},
        {'a"b': "x"},
        {"ä": "x"},
        {"a" * 65: "x"},
        {"a": "x" * 257},
        {"a": "x\ny"},
        {"a": "\udcff"},
        {f"a{number}": "" for number in range(33)},
    ],
)
def test_bad_labels_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(RegistryRefused):
        identities.parse_labels(labels)


def test_networks_are_written_in_one_way() -> None:
    given_ = ["10.0.0.0/8", "192.0.2.7", "2001:DB8::/32", "::1", "10.0.0.0/255.0.0.0"]
    assert identities.parse_networks(given_) == ("10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32", "::1/128")


def test_bad_networks_are_refused() -> None:
    with pytest.raises(
        RegistryRefused,
        match=r"network '10\.0\.0\.1/8' has bits set behind its prefix: is 10\.0\.0\.0/8 meant",
    ):
        identities.parse_networks(["10.0.0.1/8"])
    for text in ("", "ten", "10.0.0.0/33", "10.0.0.256", "10.0.0.0/8 "):
        with pytest.raises(RegistryRefused, match="is not an address range"):
            identities.parse_networks([text])
    with pytest.raises(RegistryRefused, match="at most 64 networks"):
        identities.parse_networks([f"10.0.{number}.0/24" for number in range(65)])
