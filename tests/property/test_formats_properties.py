"""Any bytes as a file of devices are refused in order; what a format writes, it reads back as it was."""

import datetime as dt
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings, strategies as st

from gateway.errors import RegistryRefused
from gateway.registry import identities
from gateway.registry.formats import FORMATS
from gateway.registry.formats.base import FileCredential, FileDevice, Ignored
from gateway.registry.formats.keys import KeyEncoding
from gateway.registry.formats.source import BadLine, DeviceFile
from gateway.registry.sealing import Key


def is_identity(text: str) -> bool:
    try:
        return bool(identities.parse_identity(text))
    except RegistryRefused:
        return False


def text(size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=size)


moments = st.none() | st.integers(0, 2**52).map(
    lambda number: dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=number)
)
credentials = st.builds(
    FileCredential,
    identity=text(30).filter(is_identity),
    key=st.binary(min_size=16, max_size=64).map(Key),
    hash=st.sampled_from(["sha256", "sha384"]),
    not_before=moments,
    not_after=moments,
    revoked_at=moments,
)
devices = st.builds(
    FileDevice,
    line=st.just(0),
    last_line=st.just(0),
    credentials=st.lists(credentials, min_size=1, max_size=3, unique_by=lambda each: each.identity).map(
        tuple
    ),
    name=text(30).filter(is_identity),
    group=st.none() | st.just("meters, large"),
    labels=st.dictionaries(st.sampled_from("abc"), text(20), max_size=3).map(
        lambda each: dict(sorted(each.items()))
    ),
    networks=st.sampled_from([(), ("10.0.0.0/8",), ("10.0.0.0/8", "2001:db8::/32")]),
    disabled=st.booleans(),
)

pieces = st.sampled_from(
    [
        *(bytes([each]) for each in b':#\n\r",[{}]\0\xff'),
        b"identity,key\n",
        b"registrationId\n",
        b'{"type":"psk","auth-id":"a","secrets":[{"key":"',
        b'{"credentials":[{"identity":"a","key":"',
        b'"}]}',
        b"00112233445566778899aabbccddeeff",
        "ä".encode(),
        b"\\u0000",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
    ]
)
files = st.binary(max_size=100) | st.lists(pieces, max_size=20).map(b"".join)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=40)
@given(content=files, encoding=st.sampled_from(get_args(KeyEncoding)))
def test_any_bytes(name: str, content: bytes, encoding: KeyEncoding) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        with DeviceFile(path) as file:
            try:
                parsed = list(FORMATS[name].read(file, encoding))
            except RegistryRefused:  # of the whole file, which is no text
                return
    for each in parsed:
        assert isinstance(each, FileDevice | BadLine | Ignored)
        assert 1 <= each.line <= content.count(b"\n") + 1
        if isinstance(each, BadLine):
            assert each.reason.isprintable()
            assert "00112233" not in each.reason or name in {"stunnel", "mosquitto", "emqx", "gnutls"}


@pytest.mark.parametrize("name", ["csv", "jsonl"])
@settings(deadline=None, max_examples=40)
@given(fleet=st.lists(devices, max_size=4, unique_by=lambda each: each.name))
def test_our_own_formats_lose_nothing(name: str, fleet: list[FileDevice]) -> None:
    assert read_back(name, fleet) == fleet


@pytest.mark.parametrize("name", ["gnutls", "hono", "mosquitto", "stunnel"])
@settings(deadline=None, max_examples=40)
@given(device=devices)
def test_identities_and_keys_come_back(name: str, device: FileDevice) -> None:
    fit = tuple(each for each in device.credentials if FORMATS[name].unfit(each.identity) is None)
    if not fit:
        return
    found = read_back(
        name, [FileDevice(0, 0, fit, device.name, disabled=False, group=None, labels={}, networks=())]
    )
    assert {each.identity: each.key for device in found for each in device.credentials} == {
        each.identity: each.key for each in fit
    }


def read_back(name: str, fleet: list[FileDevice]) -> list[FileDevice]:
    """What is read of the file that is written of these; without lines."""
    form = FORMATS[name]
    written = form.separator.join(form.write(device, form.key_encoding, with_keys=True) for device in fleet)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_text(form.begin(with_keys=True) + written + form.end(), newline="")
        with DeviceFile(path) as file:
            parsed = list(form.read(file, form.key_encoding))
    assert all(isinstance(each, FileDevice) for each in parsed), parsed
    return [
        FileDevice(0, 0, each.credentials, each.name, each.group, each.labels, each.networks, each.disabled)
        for each in parsed
        if isinstance(each, FileDevice)
    ]
