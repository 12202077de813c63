"""The systemd units: systemd takes them, and calls them well confined."""

import re
import subprocess
from pathlib import Path

import pytest

from gateway.cli.setup import CONFIGURATION
from gateway.config import load
from tests.support.peers import program

DEPLOY = Path(__file__).parents[3] / "deploy"
UNITS = sorted(DEPLOY.rglob("*.service"))
EXPOSURE_MAX = 20
"""In tenths, of 100: what `systemd-analyze security` counts as OK ends at 40."""


def analyze(*arguments: object) -> str:
    """What it complains of."""
    done = subprocess.run(
        [program("systemd-analyze"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_it(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    # The program need not be installed where the unit is checked.
    copy.write_text(re.sub(r"/\S*/gatewayctl", "/bin/true", unit.read_text()))
    assert unit.name not in analyze("verify", "--man=no", copy)  # an unknown key is a warning


def test_the_gateway_takes_its_master_key_from_where_systemd_puts_it(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "psk-gateway.service").read_text()
    (name,) = re.findall(r"^LoadCredential=(\S+):/etc/psk-gateway/master\.key$", text, re.MULTILINE)
    environment = dict(re.findall(r"^Environment=(PSKGW_\w+)=(.*)$", text, re.MULTILINE))
    assert environment == {"PSKGW_REGISTRY__MASTER_KEY_CREDENTIAL": name}
    (tmp_path / "gateway.toml").write_text(CONFIGURATION)
    assert load(tmp_path / "gateway.toml", environment).registry.master_key_credential == name


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_it_is_exposed_below_two_of_ten(unit: Path) -> None:
    analyze("security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", unit)
