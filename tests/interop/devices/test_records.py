"""Records for small receive buffers, as real clients see them: by the realm, and by what the client asks for."""

import re
import shlex
from pathlib import Path

import pytest

from gateway.registry.store import NewDevice
from tests.interop.devices.conftest import Fleet
from tests.support.gateway import Device
from tests.support.recipes import Recipe, access_for, need_header, need_program

BODY_BYTES = 20_000
OVERHEAD_BYTES = {"-tls1_2": 24, "-tls1_3": 17}
"""Of AES-GCM: explicit nonce and tag; content type and tag."""


@pytest.fixture(scope="module")
def small(devices: Fleet) -> Device:
    """In a realm whose records hold 256 bytes at most."""
    return devices.add(NewDevice(identity="small", realm="small", group="web"))


@pytest.fixture(scope="module")
def ordinary(devices: Fleet) -> Device:
    return devices.add(NewDevice(identity="ordinary", group="web"))


def record_sizes(devices: Fleet, folder: Path, device: Device, version: str, *options: str) -> list[int]:
    """Plaintext bytes of each record of a web service's answer, as `openssl s_client` receives them."""
    need_program("openssl")
    recipe = Recipe("openssl", access_for(device, devices.gateway.port()), folder / "recipe")
    command = shlex.join(
        ["openssl", "s_client", "-msg", "-connect", f"127.0.0.1:{devices.gateway.port()}", version]
        + ["-psk_identity", device.identity, "-psk", device.key, *options]
        + (["-cipher", "PSK-AES128-GCM-SHA256"] if version == "-tls1_2" else [])
    )
    request = shlex.quote(f"GET /{BODY_BYTES} HTTP/1.0\r\n\r\n")
    output = recipe.run(f"{{ printf %s {request}; sleep 0.5; }} | {command}")
    received = r"<<< .*RecordHeader.*\n    17 03 03 (\w\w) (\w\w)\n"
    if version == "-tls1_3":
        received += r"<<< .*InnerContent.*\n    17\n"
    headers = re.findall(received, output)
    sizes = [int(high + low, 16) - OVERHEAD_BYTES[version] for high, low in headers]
    assert sum(sizes) > BODY_BYTES
    return sizes


@pytest.mark.parametrize("version", OVERHEAD_BYTES)
def test_a_realm_bounds_its_records(devices: Fleet, tmp_path: Path, small: Device, version: str) -> None:
    sizes = record_sizes(devices, tmp_path, small, version, "-servername", "small.example")
    assert max(sizes) == 256
    assert len(sizes) > BODY_BYTES // 256


@pytest.mark.parametrize("version", OVERHEAD_BYTES)
def test_others_get_large_ones(devices: Fleet, tmp_path: Path, ordinary: Device, version: str) -> None:
    assert max(record_sizes(devices, tmp_path, ordinary, version)) > 4096


@pytest.mark.parametrize("version", OVERHEAD_BYTES)
@pytest.mark.parametrize("asked", [512, 1024, 2048, 4096])
def test_a_client_asks_for_small_records(
    devices: Fleet, tmp_path: Path, ordinary: Device, version: str, asked: int
) -> None:
    sizes = record_sizes(devices, tmp_path, ordinary, version, "-maxfraglen", str(asked))
    assert max(sizes) == asked


def test_the_smaller_bound_counts(devices: Fleet, tmp_path: Path, small: Device) -> None:
    options = ("-servername", "small.example", "-maxfraglen", "512")
    assert max(record_sizes(devices, tmp_path, small, "-tls1_3", *options)) == 256


MEASURE_RECORDS = """
    static unsigned char data[16384];
    int size, largest = 0;
    send_line("GET /%d HTTP/1.0\\r\\n\\r\\n");
    while ((size = mbedtls_ssl_read(&tls, data, sizeof data)) > 0)
        largest = size > largest ? size : largest;
    printf("largest %%d\\n", largest);
    return 0;
}
"""
"""In place of the messages: one read gives what is left of one record."""


@pytest.mark.parametrize(("asked", "received"), [("NONE", 16384), ("1024", 1024), ("512", 512)])
def test_mbedtls_asks_for_small_records(
    devices: Fleet, tmp_path: Path, ordinary: Device, asked: str, received: int
) -> None:
    need_program("cc")
    need_header("mbedtls/ssl.h")
    recipe = Recipe("mbedtls", access_for(ordinary, devices.gateway.port()), tmp_path / "recipe")
    program = recipe.folder / "device.c"
    connecting, found, _ = program.read_text().partition("    for (int number")
    assert found
    configured = "    mbedtls_ssl_conf_max_frag_len(&config, MBEDTLS_SSL_MAX_FRAG_LEN_" + asked + ");\n"
    before, found, after = connecting.partition('    check("setting up"')
    assert found
    program.write_text(before + configured + found + after + MEASURE_RECORDS % (2 * BODY_BYTES))
    assert f"largest {received}\n" in recipe.run()
