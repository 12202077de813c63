"""The locks fit pyproject.toml: all that it asks for is in, in versions that it allows, each with hashes, from no named place."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {
    "tests/requirements.lock": ("dev", "build"),
    "deploy/container/requirements.lock": ("all", None),
    "deploy/container/build.lock": (None, "build"),
}
PINNED = re.compile(r"([a-z0-9-]+)(?:\[([a-z0-9,-]+)\])?==(\S+)(?: ; .+)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def asked_for(extra: str | None, group: str | None) -> Iterator[Requirement]:
    """The direct requirements of an installation with an extra, and of a group beside it."""
    if extra is not None:
        yield from map(Requirement, PROJECT["project"]["dependencies"])
        yield from of_extra(extra)
    if group is not None:
        yield from map(Requirement, PROJECT["dependency-groups"][group])


def of_extra(extra: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, PROJECT["project"]["optional-dependencies"][extra]):
        if requirement.name == PROJECT["project"]["name"]:
            for other in requirement.extras:
                yield from of_extra(other)
        else:
            yield requirement


def locked(path: str) -> dict[str, list[str]]:
    """Versions by name; several where they differ by platform. Fails at a line that is neither a version nor a hash."""
    versions: dict[str, list[str]] = {}
    hashes = 1
    for line in (ROOT / path).read_text().splitlines():
        if found := PINNED.fullmatch(line):
            assert hashes, f"no hash stands before {line}"
            hashes = 0
            versions.setdefault(found[1], []).append(found[3])
        else:
            assert HASH.fullmatch(line), line
            hashes += 1
    assert hashes
    return versions


@pytest.mark.parametrize("path", LOCKS)
def test_a_lock_fits_the_project(path: str) -> None:
    versions = locked(path)
    requirements = list(asked_for(*LOCKS[path]))
    assert requirements
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not locked: make lock"
        for version in versions[name]:
            assert requirement.specifier.contains(version), f"{name} {version}: make lock"


def locked_extras(path: str) -> dict[str, set[str]]:
    found = map(PINNED.fullmatch, (ROOT / path).read_text().splitlines())
    return {line[1]: set((line[2] or "").split(",")) for line in found if line}


@pytest.mark.parametrize("path", LOCKS)
def test_what_is_needed_with_an_extra_is_locked_with_it(path: str) -> None:
    """Else pip looks for the newest version that has the extra, and refuses that one for want of a hash."""
    extras = locked_extras(path)
    for name in extras:
        try:
            needs = map(Requirement, requires(name) or ())
        except PackageNotFoundError:  # of another platform
            continue
        for need in needs:
            if need.marker is None or any(map(need.marker.evaluate, ({"extra": e} for e in extras[name]))):
                missing = need.extras - extras.get(canonicalize_name(need.name), set())
                assert not missing, f"{name} needs {need}: make lock"


def test_what_builds_the_wheel_is_what_the_project_says() -> None:
    (needed,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert needed in list(asked_for(None, "build"))


def test_the_container_and_make_test_install_with_hashes() -> None:
    containerfile = (ROOT / "deploy/container/Containerfile").read_text()
    for lock in ("requirements.lock", "build.lock"):
        assert f"--require-hashes -r {lock}" in containerfile
    installs = re.findall(r"pip install [^\n\\&]*", containerfile)
    assert all("--require-hashes" in each or "--no-deps" in each for each in installs), installs
    _, _, rule = (ROOT / "Makefile").read_text().partition("\n.venv/installed-dev:")
    installs = re.findall(r"pip install .*", rule.split("\n\n")[0])
    assert len(installs) == 2
    assert all("--require-hashes" in each or "--no-deps" in each for each in installs), installs
