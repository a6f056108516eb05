"""requirements.lock: everything that pyproject.toml asks for, pinned and hashed."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Version ends that are tested: the oldest Python there is a package for, and newer ones.
PYTHONS = ("3.11.0", "3.13.0")


def locked() -> list[tuple[Requirement, str]]:
    """Each pinned requirement, and its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    parts = [line.partition("--hash=") for line in lines]
    return [(Requirement(pin), hashes) for pin, _, hashes in parts]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_to_a_version_it_allows(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    environment = {"python_full_version": python, "python_version": python[:4]}
    pins = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin, _ in locked()
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


def test_every_pin_is_exact_and_hashed():
    for pin, hashes in locked():
        assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), pin
        assert re.match(r"sha256:[0-9a-f]{64}", hashes), pin
