"""What each format makes of the lines of a file, good and bad."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import RegistryRefused
from gateway.registry.formats import FORMATS
from gateway.registry.formats.base import FileDevice, Ignored, Parsed
from gateway.registry.formats.keys import KeyEncoding
from gateway.registry.formats.source import BadLine, DeviceFile

KEY = "ab" * 16
TEXT = "twenty characters, ok"


def read(path: Path, name: str, content: str | bytes, encoding: KeyEncoding | None = None) -> list[Parsed]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with DeviceFile(path) as file:
        return list(FORMATS[name].read(file, encoding or FORMATS[name].key_encoding))


def keys(parsed: list[Parsed]) -> dict[str, bytes]:
    """Identity -> key, of a file in which nothing is bad."""
    assert all(isinstance(each, FileDevice) for each in parsed), parsed
    return {
        credential.identity: b"" if credential.key is None else credential.key.reveal()
        for each in parsed
        if isinstance(each, FileDevice)
        for credential in each.credentials
    }


def faults(parsed: list[Parsed]) -> list[tuple[int, str]]:
    return [(each.line, each.reason) for each in parsed if isinstance(each, BadLine)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "devices"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("stunnel", f"a:{KEY}\r\nb:{TEXT}\n#c:{TEXT}\n\n", {"a": b"\xab" * 16, "b": b"", "#c": b""}),
        ("stunnel", f"a b: {TEXT}", {"a b": f" {TEXT}".encode()}),
        ("mosquitto", f"# psk\n a :\t{KEY.upper()} \n\n\nb:{KEY}", {"a": b"\xab" * 16, "b": b"\xab" * 16}),
        ("emqx", f"# x:y\na:{KEY}\r\nb:c:{TEXT}\n", {"a": KEY.encode(), "b": f"c:{TEXT}".encode()}),
        ("gnutls", f"a:{KEY}\n#c3a43a:{KEY}\n", {"a": b"\xab" * 16, "ä:": b"\xab" * 16}),
        ("gnutls", f"\ufeffa:{KEY}", {"a": b"\xab" * 16}),
        ("csv", f"key,identity\n{KEY},a\n,b\n", {"a": b"\xab" * 16, "b": b""}),
        ("csv", 'identity,labels\n"a,""b""","{""x"": ""1""}"\n', {'a,"b"': b""}),
        (
            "azure-dps",
            "registrationId,secondaryKey,primaryKey\na,eHh4,AAECAwQFBgcICQoLDA0ODw==\n",
            {"a": bytes(range(16))},
        ),
        ("jsonl", '{"credentials": [{"identity": "a"}, {"identity": "b"}]}', {"a": b"", "b": b""}),
    ],
)
def test_good_lines(path: Path, name: str, content: str, expected: dict[str, bytes]) -> None:
    found = keys(read(path, name, content))
    assert found == {
        identity: key or TEXT.encode() * (name == "stunnel") for identity, key in expected.items()
    }


def test_a_key_encoding_may_be_given(path: Path) -> None:
    assert keys(read(path, "emqx", f"a:{KEY}\n", "hex")) == {"a": b"\xab" * 16}
    assert keys(read(path, "mosquitto", "a:AAECAwQFBgcICQoLDA0ODw==\n", "base64")) == {"a": bytes(range(16))}
    assert keys(read(path, "stunnel", f"a:{KEY}\n", "text")) == {"a": KEY.encode()}


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("mosquitto", "no separator", "the line is not identity:key"),
        ("mosquitto", f":{KEY}", "the identity is empty"),
        ("mosquitto", f"{'x' * 129}:{KEY}", "the identity has 129 bytes: at most 128 are allowed"),
        ("mosquitto", f"a\x07:{KEY}", r"the identity 'a\x07' has control characters"),
        ("mosquitto", "a:", "the key has 0 bytes: 16 to 64 are allowed, 32 are advised"),
        ("mosquitto", f"a:b:{KEY}", "the key is not hex: give an even number of the digits 0-9 and a-f"),
        ("mosquitto", f"a:0x{KEY}", "the key is not hex: give an even number of the digits 0-9 and a-f"),
        ("stunnel", "a:0123456789abcdef", "the key has 8 bytes: 16 to 64 are allowed, 32 are advised"),
        ("emqx", f"a:{'x' * 65}", "the key has 65 bytes: at most 64 are allowed"),
        ("gnutls", f"#zz:{KEY}", "an identity that begins with # is hex digits of UTF-8"),
        ("gnutls", f"#ff:{KEY}", "an identity that begins with # is hex digits of UTF-8"),
        ("jsonl", "{", "the line is no JSON"),
        ("jsonl", "[1]", "the line is not a device: Expected `object`, got `array`"),
        ("jsonl", '{"credentials": []}', "the device has no credential"),
        (
            "jsonl",
            '{"credentials": [{"identity": "a", "kex": "b"}]}',
            "the line is not a device: Object contains unknown field `kex` - at `$.credentials[0]`",
        ),
        (
            "jsonl",
            '{"credentials": [{"identity": "a", "not_after": "tomorrow"}]}',
            "'tomorrow' is not a time: write 2027-01-31T12:00:00Z, or 2027-01-31 for midnight UTC",
        ),
        ("jsonl", '{"group": " x", "credentials": [{"identity": "a"}]}', "the group"),
    ],
)
def test_bad_lines(path: Path, name: str, line: str, reason: str) -> None:
    good = '{"credentials": [{"identity": "x"}]}' if name == "jsonl" else f"x:{KEY}"
    first, bad, last = read(path, name, f"{good}\n{line}\n{good}\n")
    assert isinstance(first, FileDevice)
    assert isinstance(last, FileDevice)
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    assert bad.reason.startswith(reason)
    assert KEY not in bad.reason


@pytest.mark.parametrize(
    ("header", "row", "reason"),
    [
        ("a,b", "", "the first line names the columns, separated by commas: identity is missing"),
        ("identity;key", "", "the first line names the columns, separated by commas: identity is missing"),
        ("identity,color", "", "column 'color' is unknown: there are identity, key, device, group, labels,"),
        ("identity,key,key", "", "a column is named twice"),
        ("identity,key", "a", "the line has 1 cells, and there are 2 columns"),
        ("identity,key", f'"a,{KEY}', "the line is no CSV: a quote is not closed, or stands where none may"),
        ("identity,enabled", "a,perhaps", "enabled is yes or no"),
        ("identity,hash", "a,md5", "hash 'md5' is unknown: it is sha256 or sha384"),
        ("identity,labels", "a,x=1", "labels are a JSON object of texts"),
        ("identity,allow_from", "a,10.0.0.0/8 10.0.0.1/8", "network '10.0.0.1/8' has bits set"),
        ("identity,not_before", "a,2030-01-01T00:00:00", "'2030-01-01T00:00:00' is not a time"),
        ("identity,not_before", "a,0001-01-01T00:00:00+01:00", "'0001-01-01T00:00:00+01:00' is not a time"),
    ],
)
def test_bad_tables(path: Path, header: str, row: str, reason: str) -> None:
    (fault,) = faults(read(path, "csv", f"{header}\n{row}\n"))
    assert fault[0] == (2 if row else 1)
    assert fault[1].startswith(reason)


def test_lines_of_one_device_follow_each_other_and_agree(path: Path) -> None:
    text = "identity,device,group\na,d,g\nb,d,g\nc,d,h\nd,,\n"
    first, bad, last = read(path, "csv", text)
    assert isinstance(first, FileDevice)
    assert (first.name, first.group, first.line, first.last_line) == ("d", "g", 2, 3)
    assert [each.identity for each in first.credentials] == ["a", "b"]
    assert bad == BadLine(4, "it says otherwise of device 'd' than the line before")
    assert isinstance(last, FileDevice)
    assert last.name is None


@pytest.mark.parametrize(
    "name", ["stunnel", "mosquitto", "emqx", "gnutls", "csv", "azure-dps", "jsonl", "hono"]
)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("identity\nä\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0\0\n" * 100, "is no text but a binary file, see line 1"),
        (b"\n" + bytes(1000), "is no text but a binary file, see line 2"),
    ],
)
def test_what_is_no_text_at_all(path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(RegistryRefused, match=reason):
        read(path, name, content)


def test_lines_in_another_encoding_or_too_long(path: Path) -> None:
    long = "x" * 70_000
    content = f"ä:{KEY}\n".encode("latin-1") + f"b:{long}{long}\nc:{KEY}\n{long}".encode()
    parsed = read(path, "mosquitto", content)
    assert faults(parsed) == [
        (1, "the line is not UTF-8"),
        (2, "the line is longer than 65536 bytes"),
        (4, "the line is longer than 65536 bytes"),
    ]
    assert isinstance(parsed[2], FileDevice)
    assert parsed[2].line == 3


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(RegistryRefused, match="cannot be read: No such file"):
        DeviceFile(path)
    path.mkdir()
    with pytest.raises(RegistryRefused, match=r"cannot be read: Is a directory|is no regular file"):
        DeviceFile(path)


# Hono


def entry(identity: str, **values: Any) -> dict[str, Any]:
    secrets = values.pop("secrets", [{"key": "AAECAwQFBgcICQoLDA0ODw=="}])
    return {"type": "psk", "auth-id": identity, "secrets": secrets, **values}


def test_hono_takes_an_array_or_a_sequence_however_it_is_laid_out(path: Path) -> None:
    entries = [entry(f"m{number}", comment='[{,}] \\" ' * 50) for number in range(3000)]
    expected = {f"m{number}": bytes(range(16)) for number in range(3000)}
    for text in (
        json.dumps(entries),
        json.dumps(entries, indent=3),
        "\n".join(json.dumps(each) for each in entries),
        " [ ] ",
    ):
        found = read(path, "hono", text)
        assert keys(found) == (expected if "m1" in text else {})
    (first, second) = read(path, "hono", json.dumps([entry("a"), entry("b", enabled="x")], indent=1))
    assert isinstance(first, FileDevice)
    assert isinstance(second, BadLine)
    assert (second.line, second.reason) == (
        11,
        "the entry is no credential of Hono: Expected `bool`, got `str` - at `$.enabled`",
    )


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (json.dumps([entry("a")], indent=1)[:-1], 11, "the array is not closed: the file was cut off"),
        (json.dumps([entry("a")])[:-20], 1, "the entry is no JSON, or the file was cut off"),
        (f"[{json.dumps(entry('a'))},\n{{'type'}}, {json.dumps(entry('b'))}]", 2, "the entry is no JSON"),
        (f"\n{json.dumps(entry('a'))}\nx", 3, "it is no array of JSON objects"),
        (f"[]\n{json.dumps(entry('a'))}", 2, "it is no array of JSON objects"),
        (f'[{{"x": "{"y" * 300_000}"}}]', 1, "the entry is no JSON, or longer than 65536 characters"),
        ("[" + '{"x":' * 100_000 + "1" + "}" * 100_000 + "]", 1, "the entry is no JSON, or longer than"),
    ],
)
def test_hono_stops_where_it_is_no_json(path: Path, text: str, line: int, reason: str) -> None:
    (*_, last) = read(path, "hono", text)
    assert isinstance(last, BadLine)
    assert last.line == line
    assert last.reason.startswith(reason)
    assert last.reason.endswith(": nothing was read from here on")


def test_hono_secrets(path: Path) -> None:
    old = {"key": "AAAAAAAAAAAAAAAAAAAAAA==", "not-after": "2001-01-01T00:00:00Z"}
    off = {"key": "AAAAAAAAAAAAAAAAAAAAAA==", "enabled": False}
    new = {"key": "AAECAwQFBgcICQoLDA0ODw==", "not-before": "2020-01-01T00:00:00+01:00"}
    entries = [
        entry("a", secrets=[old, off, new]),
        entry("b", secrets=[old]),
        entry("c", secrets=[new, new]),
        entry("d", secrets=[off]),
        entry("e", type="x509-cert"),
    ]
    a, b, c, d, e = read(path, "hono", json.dumps(entries))
    assert isinstance(a, FileDevice)
    assert str(a.credentials[0].not_before) == "2019-12-31 23:00:00+00:00"
    assert keys([a, b]) == {"a": bytes(range(16)), "b": bytes(16)}
    assert isinstance(c, BadLine)
    assert c.reason == "2 of its secrets are enabled and not over: an identity has one key here"
    assert isinstance(d, BadLine)
    assert d.reason.startswith("none of its secrets")
    assert e == Ignored(1, "a credential of type 'x509-cert'")


def test_hono_disabled_entries(path: Path) -> None:
    some = [entry("a", **{"device-id": "d"}), entry("b", enabled=False, **{"device-id": "d"})]
    (device,) = read(path, "hono", json.dumps(some))
    assert isinstance(device, FileDevice)
    assert (device.name, device.disabled) == ("d", False)
    assert [each.revoked_at is not None for each in device.credentials] == [False, True]
    (device,) = read(path, "hono", json.dumps([entry("a", enabled=False)]))
    assert isinstance(device, FileDevice)
    assert device.disabled is True
