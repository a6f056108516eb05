"""requirements.lock: everything that pyproject.toml asks for, pinned and hashed."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("python", ["3.11.0", "3.13.0"])  # the oldest allowed, and a newer one
def test_every_dependency_is_pinned_with_its_hash_to_a_version_it_allows(python):
    environment = {"python_full_version": python, "python_version": python[:4]}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(environment)

    pins = {}
    for line in LINES:
        if line and not line.lstrip().startswith("#"):
            words, _, hashes = line.partition("--hash=")
            pin = Requirement(words)
            assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), pin
            assert re.match(r"sha256:[0-9a-f]{64}", hashes), pin
            if applies(pin):
                pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in filter(applies, map(Requirement, wanted)):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
