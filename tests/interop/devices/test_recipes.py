"""Every page of docs/devices that can be run here is run, as `add-device --for` prints it."""

import importlib.util
import re
from pathlib import Path

import pytest

from gateway.cli.bundle import c_header
from gateway.cli.recipes import EXAMPLE, blocks, recipe, recipe_names
from gateway.registry.store import NewDevice
from tests.interop.devices.conftest import Fleet
from tests.support.recipes import Recipe, access_for, free_port, need_header, need_program, python313

DOCS = Path(__file__).parents[3] / "docs" / "devices"
NOT_EXECUTED = {"esp-idf", "zephyr"}
LINES = {
    "openssl": (["openssl"], r"^ok 1$"),
    "gnutls": (["gnutls-cli"], r"^ok 1$"),
    "nodejs": (["node"], r"100 messages acknowledged, TLSv1.3"),
    "mbedtls": (["cc", "mbedtls/ssl.h"], r"1000 messages acknowledged, TLS-ECDHE-PSK-WITH-CHACHA20"),
    "wolfssl": (["cc", "wolfssl/ssl.h"], r"1000 messages acknowledged, TLSv1.3"),
    "python": (["python3.13"], r"100 messages acknowledged, TLSv1.3"),
    "python-mbedtls": (["mbedtls"], r"100 messages acknowledged, TLSv1_2"),
    "client": ([], r"100 messages acknowledged"),
    "go": (["go"], r"100 messages acknowledged"),
}
"""Recipes that send `reading 1` and on: what they need, and what they print."""
OTHERS = {"curl", "mosquitto", "paho-mqtt"}
TUNNELLED = {"curl", "go"}


def need(names: list[str]) -> None:
    for name in names:
        if name == "python3.13":
            python313()
        elif name in {"mbedtls", "paho"}:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"the Python package {name} is not installed")
        elif name.endswith(".h"):
            need_header(name)
        else:
            need_program(name)


def prepared(devices: Fleet, folder: Path, name: str, group: str | None = None) -> Recipe:
    """The recipe for a device whose identity needs quoting in every language."""
    device = devices.add(NewDevice(identity=f'{name} "7" o\'neil ☀', group=group))
    replace = {"8080": str(free_port())} if name in TUNNELLED else {}
    return Recipe(name, access_for(device, devices.gateway.port()), folder / "recipe", replace)


@pytest.mark.parametrize("name", LINES)
def test_a_recipe_that_sends_lines(devices: Fleet, tmp_path: Path, name: str) -> None:
    needed, printed = LINES[name]
    need(needed)
    output = prepared(devices, tmp_path, name).run()
    assert re.search(printed, output, re.MULTILINE), output
    arrived = [
        event["data"] for event in devices.gateway.output_events() if event["device"].startswith(f"{name} ")
    ]
    assert arrived[0] == "reading 1"
    counted = re.search(r"(\d+) messages", output)
    assert len(arrived) == (int(counted[1]) if counted else 1)


def test_mosquitto(devices: Fleet, tmp_path: Path) -> None:
    need(["mosquitto", "mosquitto_pub"])
    recipe = prepared(devices, tmp_path, "mosquitto", "mqtt")
    with devices.broker(tmp_path):
        assert recipe.run() == "21.5\n"


def test_paho_mqtt(devices: Fleet, tmp_path: Path) -> None:
    need(["mosquitto", "python3.13", "paho"])
    recipe = prepared(devices, tmp_path, "paho-mqtt", "mqtt")
    with devices.broker(tmp_path):
        assert recipe.run() == "published\n"


def test_curl_through_the_tunnel(devices: Fleet, tmp_path: Path) -> None:
    need(["curl"])
    devices.web.posted.clear()
    assert prepared(devices, tmp_path, "curl", "web").run().endswith("stored\n")
    assert devices.web.posted == [("/readings", b'{"temperature": 21.5}')]


def test_every_page_is_executed_or_says_that_it_is_not() -> None:
    assert set(recipe_names()) == {*LINES, *OTHERS, *NOT_EXECUTED}
    for name in recipe_names():
        page = recipe(name, EXAMPLE)
        assert ("**Not executed in the tests**" in page) == (name in NOT_EXECUTED), name
        assert ("Executed in" in page) == (name not in NOT_EXECUTED), name


def test_the_overview_links_to_every_page() -> None:
    rows = re.findall(
        r"^\| \[([\w-]+)\]\(\1\.md\) \|.*\| (.*) \|$", (DOCS / "README.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in rows} == set(recipe_names())
    assert {name for name, executed in rows if executed == "no"} == NOT_EXECUTED


def test_the_headers_on_the_pages_are_what_a_bundle_writes() -> None:
    found = [
        block.text
        for name in NOT_EXECUTED
        for block in blocks((DOCS / f"{name}.md").read_text())
        if block.file == "device.h"
    ]
    assert found == [c_header(EXAMPLE)] * len(NOT_EXECUTED)


def test_the_c_program_with_mbedtls_is_short() -> None:
    (program,) = (block for block in blocks(recipe("mbedtls", EXAMPLE)) if block.file == "device.c")
    assert program.text.count("\n") < 100
